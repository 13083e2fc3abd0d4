"""Finding: the layers of a network that can be decomposed, and the reasons for those that cannot."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankfold.decompositions.wiring import Call
from rankfold.errors import ModelError, UnknownNameError
from rankfold.network.hooks import attached
from rankfold.network.kinds import FLOATS, LAYER_KINDS, shape_of
from rankfold.network.passes import Inputs, run
from rankfold.plan import LayerSpec


@dataclass(frozen=True)
class Layers:
    """The layers of a network that can be decomposed, and why the other weight-carrying ones cannot."""

    found: tuple[LayerSpec, ...]
    skipped: Mapping[str, str]


def holds_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm with a mean and variance of its own, and not of every batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def check_model(model: nn.Module) -> None:
    """Raises ModelError for a network without parameters, or with weights that are missing or not finite."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if not any(True for _ in model.parameters()):
        raise ModelError(f"the model ({type(model).__name__}) has no parameters; there is nothing to compress")
    for name, tensor in tensors:
        if torch.nn.parameter.is_lazy(tensor):
            raise ModelError(f"{name}: the parameter is not initialised yet; run the model once before compressing it")
        if tensor.is_meta:
            raise ModelError(f"{name}: the tensor is on the meta device and has no values; load the weights first")
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise ModelError(f"{name}: {count} of {tensor.numel()} entries are NaN or infinite; use a sound checkpoint")


def find_layers(
    model: nn.Module, inputs: Inputs, *, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> Layers:
    """Every layer that can be decomposed, with the calls it serves, and the reason for every one that cannot.

    `include` and `exclude` are glob patterns over qualified names; a name also matches the modules inside it. Raises
    UnknownNameError for a pattern that matches no weight-carrying layer.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    carriers = {module: module_names for module, module_names in names.items() if _carries_weight(module)}
    everything = [name for module_names in carriers.values() for name in module_names]
    for label, patterns in (("include pattern", include or ()), ("exclude pattern", exclude)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in everything):
                raise UnknownNameError(label, pattern, everything)

    skipped: dict[str, str] = {}
    candidates: list[nn.Module] = []
    for module, module_names in carriers.items():
        reason = _unfit(module) or _unwanted(module_names, include, exclude)
        if module is model:
            reason = "it is the model itself and cannot be replaced inside it; wrap it in nn.Sequential"
        if reason:
            skipped[module_names[0]] = reason
        else:
            candidates.append(module)
    calls = _record_calls(model, inputs, candidates)
    found = []
    for group in _tied(candidates):
        reason = _untied_user(model, group, names) or ("" if any(calls[m] for m in group) else _NEVER_CALLED)
        group_names = [name for module in group for name in carriers[module]]
        if reason:
            skipped.update(dict.fromkeys((carriers[module][0] for module in group), reason))
            continue
        served = tuple(call for module in group for call in calls[module])
        weight = cast(Tensor, group[0].weight)
        found.append(
            LayerSpec(
                name=group_names[0],
                kind=type(group[0]).__name__,
                shape=replace(shape_of(group[0]), calls=served),
                dtype=str(weight.dtype).removeprefix("torch."),
                itemsize=weight.element_size(),
                weight=tuple(weight.shape),
                aliases=tuple(group_names[1:]),
            )
        )
    return Layers(tuple(found), skipped)


def matches(name: str, pattern: str) -> bool:
    """Whether a qualified name fits a glob pattern, or lies inside a module that does."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def traced(
    model: nn.Module, modules: Iterable[nn.Module], forward: Callable[[], object]
) -> tuple[list[nn.Module], dict[nn.Module, str]]:
    """The calls of some modules in a pass, in order, and for each the name of the batch norm that takes its output.

    `forward` runs the pass. A batch norm that is called more than once belongs to none.
    """
    norms = {module: name for name, module in model.named_modules() if holds_statistics(module)}
    outputs: list[tuple[nn.Module, Any]] = []
    takers: dict[nn.Module, list[nn.Module | None]] = {}

    def taken(module: nn.Module, args: tuple[Any, ...]) -> None:
        giver = next((one for one, output in outputs if args and args[0] is output), None)
        takers.setdefault(module, []).append(giver)

    handles = [one.register_forward_hook(lambda m, args, out: outputs.append((m, out))) for one in modules]
    handles += [norm.register_forward_pre_hook(taken) for norm in norms]
    with attached(handles):
        forward()
    followers = {
        givers[0]: norms[norm] for norm, givers in takers.items() if len(givers) == 1 and givers[0] is not None
    }
    return [module for module, _ in outputs], followers


_NEVER_CALLED = "never called on the example inputs, so its cost is unknown"


def _carries_weight(module: nn.Module) -> bool:
    """Whether a module itself owns a parameter that is at least a matrix."""
    if type(module) in LAYER_KINDS or isinstance(module, tuple(LAYER_KINDS)):
        return True
    return any(parameter is not None and parameter.ndim >= 2 for parameter in module._parameters.values())


def _unfit(module: nn.Module) -> str:
    """Why a weight-carrying module cannot be decomposed; empty where it can."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        return "its weight is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this weight itself, past the layer"
    if type(module) not in LAYER_KINDS:
        base = next((known.__name__ for known in LAYER_KINDS if isinstance(module, known)), None)
        if base:
            return f"{kind} is a subclass of {base} and may compute something else"
        return f"{kind} is not a kind of layer that is decomposed"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed, not a parameter; remove the weight normalisation first"
    if cast(Tensor, module.weight).dtype not in FLOATS:
        return f"its dtype {cast(Tensor, module.weight).dtype} is not a real floating one"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks, which would be lost"
    return ""


def _unwanted(names: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str]) -> str:
    if any(matches(name, pattern) for name in names for pattern in exclude):
        return "excluded"
    if include is not None and not any(matches(name, pattern) for name in names for pattern in include):
        return "not included"
    return ""


def _record_calls(model: nn.Module, inputs: Inputs, modules: Sequence[nn.Module]) -> dict[nn.Module, list[Call]]:
    """For each module the sizes it was called with in one pass over the inputs."""
    calls: dict[nn.Module, list[Call]] = {module: [] for module in modules}

    def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        axes = LAYER_KINDS[type(module)].axes
        given = tuple(args[0].shape) if args else ()
        if axes == 0:
            calls[module].append(Call(batch=output[..., 0].numel()))
        else:
            batch = given[0] if len(given) == axes + 2 else 1
            calls[module].append(Call(batch, given[-axes:], tuple(output.shape[-axes:])))

    with attached(module.register_forward_hook(record) for module in modules):
        run(model, inputs)
    return calls


def _tied(modules: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Modules in groups that use one and the same weight."""
    groups: dict[int, list[nn.Module]] = {}
    for module in modules:
        groups.setdefault(id(module.weight), []).append(module)
    return list(groups.values())


def _untied_user(model: nn.Module, group: Sequence[nn.Module], names: Mapping[nn.Module, Sequence[str]]) -> str:
    """Why a tied weight must stay whole: something that is not a decomposed layer of the same form uses it too."""
    weight = group[0].weight
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is weight and not (module in group and attribute == "weight"):
                return f"its weight is tied to {names[module][0]} ({type(module).__name__}), which stays as it is"
    if len({(type(module), shape_of(module)) for module in group}) > 1:
        return "its weight is shared by layers of different kinds"
    return ""
