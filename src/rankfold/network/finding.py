"""Finding: the layers of a network that can be decomposed, and the reasons for those that cannot."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from rankfold.errors import UnknownNameError
from rankfold.network.costs import storage_key
from rankfold.network.kinds import FLOATS, base_of, kind_of, known_kind, shape_of
from rankfold.network.passes import Inputs
from rankfold.network.stand_ins.attention import Attention
from rankfold.network.stand_ins.recurrent import Recurrent
from rankfold.network.stand_ins.weight import computes_weight
from rankfold.network.tracing import uses
from rankfold.plan import LayerSpec


@dataclass(frozen=True)
class Layers:
    """The layers of a network that can be decomposed, and why the other weight-carrying ones cannot."""

    found: tuple[LayerSpec, ...]
    skipped: Mapping[str, str]

    def without(self, reasons: Mapping[str, str]) -> Layers:
        """The layers but for some, which are skipped for the given reasons, as is what else reasons are given for."""
        left = tuple(layer for layer in self.found if layer.name not in reasons)
        return Layers(left, {**self.skipped, **reasons})


def find_layers(
    model: nn.Module,
    inputs: Inputs,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    closed: Mapping[str, str] | None = None,
) -> Layers:
    """Every layer that can be decomposed, with the calls it serves, and the reason for every one that cannot.

    `include` and `exclude` are glob patterns over qualified names; a name also matches the modules inside it, and what
    is included is so with all layers that share its weight. `closed` are reasons that are known of some modules. Raises
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
    sound: list[nn.Module] = []
    for module, module_names in carriers.items():
        reason = (closed or {}).get(module_names[0]) or _unfit(module)
        if reason:
            skipped[module_names[0]] = reason
        else:
            sound.append(module)
    candidates: list[nn.Module] = []
    for group in _tied(sound):
        group_names = [name for module in group for name in carriers[module]]
        for module in group:
            reason = _unwanted(carriers[module], group_names, include, exclude)
            if reason:
                skipped[carriers[module][0]] = reason
            else:
                candidates.append(module)
    seen = uses(model, inputs, candidates)
    found = []
    for group in _tied(candidates):
        group_names = [name for module in group for name in carriers[module]]
        reason = _untied_user(model, group, names) or _unused(group, seen.calls, seen.readers)
        if reason:
            skipped.update(dict.fromkeys((carriers[module][0] for module in group), reason))
            continue
        served = tuple(call for module in group for call in seen.calls[module])
        weight = cast(Tensor, group[0].weight)
        found.append(
            LayerSpec(
                name=group_names[0],
                kind=known_kind(group[0]).name,
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


def _carries_weight(module: nn.Module) -> bool:
    """Whether a module itself owns a parameter that is at least a matrix."""
    if base_of(module) is not None:
        return True
    matrices = [name for name, one in module._parameters.items() if one is not None and one.ndim >= 2]
    return bool(matrices) and not isinstance(module, Attention)


def _unfit(module: nn.Module) -> str:
    """Why a weight-carrying module cannot be decomposed; empty where it can."""
    kind, base, own = kind_of(module), base_of(module), type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted; give the module that it was scripted from"
    if isinstance(module, Recurrent):
        return "what multiplies the state runs step by step on what it gave before; its errors would feed back"
    if kind is None:
        if base is None:
            return f"{own} is not a kind of layer that is decomposed"
        return f"the forward of this {own} is not that of {base.__name__}; it may compute something else"
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        return "it keeps extra state beside its weight, which would be lost"
    if computes_weight(module) or not isinstance(module.weight, nn.Parameter):
        return "its weight is computed, not a parameter"
    if module.weight.dtype not in FLOATS:
        return f"its dtype {module.weight.dtype} is not a real floating one"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "it renormalises the rows that it reads"
    return ""


def _unwanted(names: Sequence[str], tied: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str]) -> str:
    """Why a user does not want a layer decomposed; one that is tied to an included layer is included with it."""
    if any(matches(name, pattern) for name in names for pattern in exclude):
        return "excluded"
    if include is not None and not any(matches(name, pattern) for name in tied for pattern in include):
        return "not included"
    return ""


def _unused(
    group: Sequence[nn.Module], calls: Mapping[nn.Module, Sequence[object]], readers: Mapping[nn.Module, str]
) -> str:
    """Why factors would not run in place of some layers; empty where they would."""
    reader = next((readers[module] for module in group if module in readers), None)
    if reader:
        return f"its weight is read by {reader}, past the layer, which would multiply by it all the same"
    if not any(calls[module] for module in group):
        return "not run on the example inputs, so its cost is unknown"
    return ""


def _tied(modules: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Modules in groups that use one and the same weight."""
    groups: dict[object, list[nn.Module]] = {}
    for module in modules:
        groups.setdefault(storage_key(cast(Tensor, module.weight)), []).append(module)
    return list(groups.values())


def _untied_user(model: nn.Module, group: Sequence[nn.Module], names: Mapping[nn.Module, Sequence[str]]) -> str:
    """Why a tied weight must stay whole: something that is not a decomposed layer of the same form uses it too."""
    key = storage_key(cast(Tensor, group[0].weight))
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None or (module in group and attribute == "weight"):
                continue
            if storage_key(parameter) == key:
                return f"its weight is tied to {names[module][0]} ({type(module).__name__}), which stays as it is"
    if len({shape_of(module) for module in group}) > 1:
        return "its weight is shared by layers that use it in different forms"
    return ""
