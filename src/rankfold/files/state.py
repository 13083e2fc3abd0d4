"""A model's state as it is written: tensors, and extra state of modules as far as JSON holds it; nothing is pickled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import ArtifactError, PlanError
from rankfold.plan import LayerPlan, Plan

EXTRA = "_extra_state"
"""What PyTorch calls a module's extra state in a state dict."""
COMPILED = "_orig_mod"
"""What torch.compile calls the module inside its own."""


def state_of(model: nn.Module) -> dict[str, Any]:
    """The model's state dict by bare names. Raises ArtifactError for what can neither be a tensor's nor JSON's."""
    state = {}
    for name, value in model.state_dict().items():
        path, _, last = name.rpartition(".")
        if not isinstance(value, Tensor) and (last != EXTRA or _foreign(value)):
            inside = f" with a {_foreign(value)} inside" if isinstance(value, (list, dict)) else ""
            what = "extra state" if last == EXTRA else f"{last!r}"
            raise ArtifactError(
                f"{path or 'the model'} ({type(model.get_submodule(path)).__name__}): its {what} is of type "
                f"{type(value).__name__}{inside}; what can be saved is a tensor, or numbers, text, lists and dicts"
            )
        state[".".join(part for part in name.split(".") if part != COMPILED)] = value
    return state


def check_fits(state: Mapping[str, Any], plan: Plan) -> None:
    """Raises PlanError, naming the layer, where a model's state is not that of the plan's layers."""
    entries: dict[str, int] = {}
    for name, value in state.items():
        stage = re.fullmatch(r"(?:(.*)\.)?\d+\.weight", name)
        if stage:
            path = stage.group(1) or ""
            entries[path] = entries.get(path, 0) + value.numel()
    for layer in plan.layers:
        for path in (layer.name, *layer.aliases):
            reason = _misfit(path, layer, state, entries)
            if reason:
                raise PlanError(f"{path}: {reason}; give the plan the model was compressed by")


def split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors to be written, a tied one under its first name alone, and the rest, which is extra state."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if not _is_extra(name):
            if tensor.numel() and key in seen:
                continue
            seen.add(key)
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, {name: value for name, value in state.items() if not isinstance(value, Tensor)}


def fill_(model: nn.Module, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Gives the model what `split` took from another, in place, dtypes included; ties stay. Raises PlanError."""
    own = model.state_dict(keep_vars=True)
    state = {name: tensor for name, tensor in own.items() if not _is_extra(name)}
    extra = {**rest, **{name: tensor for name, tensor in tensors.items() if _is_extra(name)}}
    filled = {id(state[name]) for name in tensors if name in state}
    missing = [name for name, tensor in state.items() if id(tensor) not in filled]
    missing += [name for name in own if _is_extra(name) and name not in extra]
    unknown = sorted({*tensors, *rest} - set(own))
    if unknown or missing:
        names = ", ".join([*sorted(missing), *unknown][:5])
        raise PlanError(f"the saved weights do not fit the model: {names}; build the model the plan was made for")
    for name in tensors.keys() - extra.keys():
        tensor, place = tensors[name], state[name]
        if place.shape != tensor.shape:
            raise PlanError(f"{name}: saved with shape {tuple(tensor.shape)}, the model has {tuple(place.shape)}")
        device = torch.device("cpu") if place.is_meta else place.device
        place.data = tensor.to(
            device, copy=True
        )  # what was mapped from a file may be unaligned: kernels then round otherwise
    for name, value in extra.items():
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        try:
            module.set_extra_state(value)
        except Exception as error:
            reason = " ".join(str(error).split())
            where = f"{path or 'the model'} ({type(module).__name__})"
            raise PlanError(f"{where} does not take back its extra state: {reason}") from error


def _misfit(path: str, layer: LayerPlan, state: Mapping[str, Any], entries: Mapping[str, int]) -> str:
    """Why a layer of the plan is not what a model's state has at `path`; empty where it is."""
    name = f"{path}.weight" if path else "weight"
    shape = tuple(state[name].shape) if name in state else None
    if layer.decomposition is None:
        there = f"weight {shape} there" if shape else f"no {name}"
        fits = shape == layer.dense or not (shape or path in entries)  # parts of what is not opened have no name
        return "" if fits else f"the plan keeps it, with weight {layer.dense}, the model has {there}"
    found = entries.get(path)
    if found is None or shape:
        there = f"the whole weight {shape} there" if shape else f"no {path}.0.weight"
        return f"the plan makes it {layer.decomposition}, the model has {there}"
    if found != layer.after.params:
        ranks = ", ".join(map(str, layer.ranks))
        form = f"{layer.decomposition} of ranks {ranks}, {layer.after.params} entries"
        return f"the plan makes it {form}, the model's factors have {found}"
    return ""


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == EXTRA


def _foreign(value: Any) -> str:
    """The type of the first thing in `value` that JSON would not give back as it is; empty where there is none."""
    if type(value) is list:
        return next(filter(None, map(_foreign, value)), "")
    if type(value) is dict:
        odd = next((f"key of type {type(key).__name__}" for key in value if type(key) is not str), "")
        return odd or next(filter(None, map(_foreign, value.values())), "")
    return "" if value is None or type(value) in (bool, int, float, str) else type(value).__name__
