"""Passes: running a network on inputs, and the tensors that go in and come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import ModelError

Inputs = Any
"""Example inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments."""


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output on example inputs, without gradients, in evaluation mode; its mode is restored."""
    args, kwargs = arguments_of(inputs)
    with evaluating(model), torch.no_grad():
        return model(*args, **kwargs)


def arguments_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every submodule gets its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def describe_inputs(inputs: Inputs) -> str:
    """Shapes and dtypes of example inputs in words."""
    if isinstance(inputs, Tensor):
        return f"{tuple(inputs.shape)} {str(inputs.dtype).removeprefix('torch.')}"
    if isinstance(inputs, Mapping):
        return "{" + ", ".join(f"{name}: {describe_inputs(value)}" for name, value in inputs.items()) + "}"
    if isinstance(inputs, (tuple, list)):
        return "(" + ", ".join(map(describe_inputs, inputs)) + ")"
    return type(inputs).__name__


def output_of(output: Any) -> Tensor:
    """The tensor a network's output is compared by: itself, its `logits`, or its first tensor.

    Raises ModelError where there is none.
    """
    named = getattr(output, "logits", output)
    found = next(iter(tensors_in(named)), None)
    if found is None or not found.is_floating_point():
        raise ModelError(f"the model returns {type(output).__name__}, which holds no floating tensor to compare")
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if hasattr(value, "values") else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]
