"""Opening: packed and wrapped modules as stock layers, so that all the rest sees layers alone.

An opened module does what it did before, with a layer of `LAYER_KINDS` for every matrix in it. The forms:

- `attention`: `nn.MultiheadAttention` with a Linear per projection;
- `recurrent`: LSTM, GRU and RNN with a Linear for what the inputs of a layer meet;
- `stack`: a tensor of several matrices (experts), indexed by the module that holds it;
- `weight`: a layer whose weight is computed (parametrised, pruned, standardised), or that pads its input by itself,
  around the weight as it comes out;
- `compiled`: a part of the network that was compiled, as it was before.

What is opened is tried: the network has to give the same outputs as before, or the module stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankfold.errors import reason_of
from rankfold.network.copies import duplicate, is_compiled, needs_copy, replaced, sharing
from rankfold.network.costs import storage_key, unfused
from rankfold.network.hooks import attached
from rankfold.network.kinds import base_of, kind_of
from rankfold.network.passes import Inputs, evaluating, run, same, tensors_in
from rankfold.network.stand_ins.attention import Attention, is_self_attention
from rankfold.network.stand_ins.recurrent import Recurrent
from rankfold.network.stand_ins.stack import Stack
from rankfold.network.stand_ins.weight import NotPlainError, computed, computes_weight

Opening = Mapping[str, Any]
"""How a module is opened, in JSON's types: its `form`, and what of it was found by running."""

SMALLEST_STACK = 8
"""Least rows and columns of matrices that are looked for in tensors of three axes."""


@dataclass(frozen=True)
class Opened:
    """A network with what is packed opened, how, and why other packed modules are not."""

    model: nn.Module
    openings: Mapping[str, Opening] = field(default_factory=dict)
    closed: Mapping[str, str] = field(default_factory=dict)


def opened(model: nn.Module, inputs: Inputs) -> Opened:
    """The network, opened where it can be; it is left as it is, and shares its tensors with what is returned."""
    base = duplicate(model) if needs_copy(model) else model
    compiled = {name: {"form": "compiled"} for name, module in base.named_modules() if is_compiled(module)}
    if compiled:
        base = open_(sharing(base), compiled)
    found = dict(_openable(base))
    openings, closed = _settled(base, inputs, found) if found else ({}, {})
    return Opened(open_(sharing(base), openings) if openings else base, {**compiled, **openings}, closed)


def open_(model: nn.Module, openings: Mapping[str, Opening]) -> nn.Module:
    """The model with some modules opened, in place; returns the root."""
    for name, opening in openings.items():
        places, made = _places(model, name), FORMS[opening["form"]](model, name, opening)
        for place in places:
            model = replaced(model, place, made)
    return model


def _places(model: nn.Module, name: str) -> list[str]:
    """Every name of the module at a name; that name alone where a parameter is there."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return [other for other, module in modules.items() if module is modules[name]] if name in modules else [name]


def within(openings: Mapping[str, Opening], names: Iterable[str]) -> dict[str, Opening]:
    """The openings that some layers lie in; compiled parts are opened in any case."""
    layers = list(names)
    return {
        place: opening
        for place, opening in openings.items()
        if opening["form"] == "compiled" or any(f"{name}.".startswith(f"{place}." if place else "") for name in layers)
    }


def _openable(model: nn.Module) -> Iterable[tuple[str, Opening]]:
    """Every module that may be opened, with the form; nothing inside a module that is."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{place}.") or not place for place in inside):
            continue
        form = _form(module)
        if form is not None:
            inside.append(name)
            yield name, {"form": form}
            continue
        for own, parameter in module._parameters.items():
            if base_of(module) is None and parameter is not None and _is_stack(parameter):
                yield f"{name}.{own}".lstrip("."), {"form": "stack"}


def _form(module: nn.Module) -> str | None:
    """The form in which a module is opened, by what it is."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
        return "attention"
    if isinstance(module, nn.RNNBase) and type(module).forward in {one.forward for one in (nn.LSTM, nn.GRU, nn.RNN)}:
        return None if parametrize.is_parametrized(module) or "weight_ih_l0" not in module._parameters else "recurrent"
    if base_of(module) in _WITH_WEIGHTS and (computes_weight(module) or kind_of(module) is None):
        return "weight"
    return None


_WITH_WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _is_stack(parameter: Tensor) -> bool:
    return parameter.ndim == 3 and parameter.shape[0] > 1 and min(parameter.shape[1:]) >= SMALLEST_STACK


def _settled(model: nn.Module, inputs: Inputs, found: dict[str, Opening]) -> tuple[dict[str, Opening], dict[str, str]]:
    """The openings that leave the outputs as they are, with what running them told; and why the others do not."""
    with unfused():
        wanted = tensors_in(_observed(model, inputs, found))
        told = _tried(model, inputs, found, wanted)
        if isinstance(told, dict):
            return told, {}
        openings, closed = {}, {}
        for name, opening in found.items():
            told = _tried(model, inputs, {name: opening}, wanted)
            if isinstance(told, dict):
                openings.update(told)
            elif opening["form"] != "stack":
                closed[name] = told
    return openings, closed


def _observed(model: nn.Module, inputs: Inputs, found: dict[str, Opening]) -> Any:
    """The outputs of the network as it is; notes which attentions are of one input to itself."""
    calls: dict[str, list[bool]] = {name: [] for name, one in found.items() if one["form"] == "attention"}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *(kwargs[one] for one in ("query", "key", "value") if one in kwargs)]
            calls[name].append(is_self_attention(tuple(given)))

        return see

    hooks = (model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in calls)
    with attached(hooks):
        outputs = run(model, inputs)
    for name, selves in calls.items():
        found[name] = {**found[name], "packed": all(selves)}
    return outputs


def _tried(
    model: nn.Module, inputs: Inputs, openings: Mapping[str, Opening], wanted: list[Tensor]
) -> dict[str, Opening] | str:
    """The openings with what running them told, or why the network is another with them."""
    try:
        copied = open_(sharing(model), openings)
        outputs = tensors_in(run(copied, inputs))
    except NotPlainError as error:
        return f"it is no layer with a weight of its own: {error}"
    except Exception as error:
        return f"the network does not run once it is opened: {reason_of(error)}"
    if _parameters(copied) > _parameters(model):
        return "opening it would untie weights that are shared"
    if not same(outputs, wanted):
        return "it computes something else than a layer with its weight"
    told: dict[str, Opening] = {}
    for name, opening in openings.items():
        stack = copied.get_submodule(name)
        if not isinstance(stack, Stack):
            told[name] = opening
        elif stack.by_rows is not None:
            told[name] = {**opening, "by_rows": stack.by_rows}
    return told


def _parameters(model: nn.Module) -> int:
    """Entries of all parameters, each once that is one in memory."""
    return sum({storage_key(one): one.numel() for one in model.parameters()}.values())


def _attention(model: nn.Module, name: str, opening: Opening) -> nn.Module:
    return Attention(cast(nn.MultiheadAttention, model.get_submodule(name)), packed=opening["packed"])


def _recurrent(model: nn.Module, name: str, opening: Opening) -> nn.Module:
    return Recurrent(cast(nn.RNNBase, model.get_submodule(name)))


def _stack(model: nn.Module, name: str, opening: Opening) -> nn.Module:
    holder_name, _, own = name.rpartition(".")
    holder = model.get_submodule(holder_name)
    config: Any = getattr(holder, "config", None)
    if hasattr(config, "_experts_implementation"):  # transformers: its plain loop over experts indexes the tensor
        config = copy.copy(config)
        config._experts_implementation = "eager"
        cast(Any, holder).config = config
    return Stack(cast(nn.Parameter, holder._parameters[own]), opening.get("by_rows"))


def _weight(model: nn.Module, name: str, opening: Opening) -> nn.Module:
    module = model.get_submodule(name)
    with evaluating(module), torch.no_grad():
        return computed(module, cast("type[nn.Module]", base_of(module)))


def _compiled(model: nn.Module, name: str, opening: Opening) -> nn.Module:
    return cast(nn.Module, model.get_submodule(name)._modules["_orig_mod"])


FORMS: dict[str, Callable[[nn.Module, str, Opening], nn.Module]] = {
    "attention": _attention,
    "recurrent": _recurrent,
    "stack": _stack,
    "weight": _weight,
    "compiled": _compiled,
}
"""For every form what makes the opened module of the one at a name."""
