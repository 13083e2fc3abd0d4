"""Copies of a network: with tensors of their own, or sharing the original's; and modules put in place of others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import ModelError, reason_of
from rankfold.network.costs import storage_key


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy; raises ModelError where the model does not allow one.

    Tensors that are one in memory stay one, also where they are tied by `.data`; what is no leaf of a graph, or was
    made under inference mode, is copied as an ordinary tensor.
    """
    made: dict[Any, Tensor] = {}

    def own(tensor: Tensor) -> Tensor:
        key = storage_key(tensor)
        if key not in made:
            made[key] = tensor.detach().clone()
        return made[key]

    return _copied(model, own)


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same numbers in memory."""
    return _copied(model, lambda tensor: tensor)


def needs_copy(model: nn.Module) -> bool:
    """Whether the model has tensors that gradients cannot pass, made under inference mode."""
    return any(tensor.is_inference() for tensor in _tensors(model))


def replaced(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The model with another module in the place of this name, in place; the module itself where it is the root."""
    if not name:
        return module
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if attribute in parent._parameters:
        del parent._parameters[attribute]
    setattr(parent, attribute, module)
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers: data parallelism and `torch.compile`."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif is_compiled(model):
            model = model._modules["_orig_mod"]  # pyrefly: ignore[bad-assignment]
        else:
            return model


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` makes; told by its name, as asking the compiler would import it."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def _copied(model: nn.Module, tensor_of: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy in which every tensor a module holds is what `tensor_of` makes of it."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = _as(tensor, tensor_of(tensor))
    try:
        copied: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied ({reason_of(error)}); build it anew, without open graphs, files or locks in it"
        ) from error
    return copied


def _as(original: Tensor, tensor: Tensor) -> Tensor:
    """A tensor as what the original is: a parameter of its class and flags, or a plain tensor."""
    if tensor is original:
        return original
    if not isinstance(original, nn.Parameter):
        return tensor
    if type(original) is not nn.Parameter:
        return copy.deepcopy(original)
    made = nn.Parameter(tensor, original.requires_grad)
    made.__dict__.update(original.__dict__)
    return made


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module holds: parameters, buffers, and attributes."""
    for module in model.modules():
        held = {**module._parameters, **module._buffers, **vars(module)}
        for tensor in held.values():
            if isinstance(tensor, Tensor) and not torch.nn.parameter.is_lazy(tensor):
                yield tensor
