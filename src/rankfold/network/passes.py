"""Passes: running a network on inputs, and the tensors that go in and come out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankfold.errors import ModelError

TOLERANCE = 1e-3
"""Largest difference of outputs, relative to the largest output, between a network and what should compute the same."""
Inputs = Any
"""Example inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments."""


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output on example inputs, without gradients, in evaluation mode; its mode is restored.

    The model gets copies of the inputs, which it may change, on its own device, and draws the same random numbers in
    every pass.
    """
    args, kwargs = arguments_of(copied(inputs, device_of(model)))
    with evaluating(model), seeded(model), torch.no_grad():
        return model(*args, **kwargs)


def run_with(model: nn.Module, named: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """The model's output with other tensors for some parameters, by their names; whatever shares one gets it as well.

    As `run`, but in the mode that the model is in, and with gradients where they are on.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    given = {parameters[name]: tensor for name, tensor in named.items()}
    # each module once: of one that has two names, `functional_call` would not put its own tensors back
    everywhere = {
        f"{path}.{name}".lstrip("."): given[parameter]
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter in given
    }
    args, kwargs = arguments_of(copied(inputs, device_of(model)))
    with seeded(model):
        return torch.func.functional_call(model, everywhere, args, kwargs, tie_weights=False)


def arguments_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def few(batches: Iterable[Inputs], count: int) -> list[Inputs]:
    """The first examples of some batches, `count` of them or a few more."""
    found: list[Inputs] = []
    for batch in batches:
        size = examples_in(batch)
        found.append(_part(batch, slice(count)) if size > count else batch)
        count -= size
        if count <= 0:
            break
    return found


def parted(batches: Iterable[Inputs], share: int, most: int) -> tuple[list[Inputs], list[Inputs]]:
    """Batches without their last examples, and these: one of every `share`, `most` at most."""
    kept, ending = list(batches), list[Inputs]()
    count = min(sum(map(examples_in, kept)) // share, most)
    while count > 0:
        batch = kept.pop()
        size = examples_in(batch)
        if size > count:
            kept.append(_part(batch, slice(size - count)))
            batch = _part(batch, slice(size - count, None))
        ending.insert(0, batch)
        count -= size
    return kept, ending


def split(batches: Iterable[Inputs], most: int) -> list[Inputs]:
    """Batches in parts of so many examples at most, where they can be told apart."""
    found: list[Inputs] = []
    for batch in batches:
        size = examples_in(batch)
        found += (
            [_part(batch, slice(start, start + most)) for start in range(0, size, most)] if size > most else [batch]
        )
    return found


def rejoined(batches: Sequence[Inputs], most: int) -> list[Inputs]:
    """The same examples in as few batches of so many at most as hold them; of other forms, in parts of those given."""
    alone = split(batches, 1)
    if not are_single(alone):
        return split(batches, most)
    return [joined(alone[start : start + most]) for start in range(0, len(alone), most)]


def are_single(parts: Sequence[Inputs]) -> bool:
    """Whether all are one example, of one form, so that any of them can be joined."""
    return len(set(map(describe_inputs, parts))) == 1 and all(examples_in(one) == 1 for one in parts)


def joined(parts: Sequence[Inputs]) -> Inputs:
    """Batches of the same form as one; what has no examples in it is that of the first."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts)) if first.ndim else first
    if isinstance(first, Mapping):
        return {name: joined([part[name] for part in parts]) for name in first}
    return type(first)(map(joined, zip(*parts, strict=True))) if type(first) in (tuple, list) else first


def examples_in(inputs: Inputs) -> int:
    """How many examples a batch holds, where all its tensors agree on it; else one."""
    sizes = {len(one) for one in tensors_in(inputs) if one.ndim}
    return sizes.pop() if len(sizes) == 1 else 1


def _part(inputs: Inputs, examples: slice) -> Inputs:
    return mapped(inputs, lambda tensor: tensor[examples] if tensor.ndim else tensor)


def copied(inputs: Inputs, device: torch.device | None = None) -> Inputs:
    """The same inputs in tensors of their own, ordinary ones where they were made under inference mode; on a device,
    where one is named.
    """
    return mapped(inputs, lambda tensor: tensor.detach().to(device, copy=True))


def device_of(model: nn.Module) -> torch.device | None:
    """The device that all of a model's weights lie on; None where they lie on several, or nowhere."""
    devices = {tensor.device for tensor in model.parameters() if not tensor.is_meta}
    return devices.pop() if len(devices) == 1 else None


def mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same inputs with every tensor changed, in mappings, tuples and lists."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: mapped(value, change) for name, value in inputs.items()}
    return type(inputs)(mapped(one, change) for one in inputs) if type(inputs) in (tuple, list) else inputs


@contextmanager
def seeded(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Random numbers from `seed` for PyTorch, NumPy and Python; all three go on as they were afterwards."""
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


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


def digest_of(batches: Iterable[Inputs]) -> str:
    """SHA-256 of some batches: names, types, shapes and values."""
    hasher = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for name, one in value.items():
                hasher.update(repr(name).encode())
                add(one)
        elif isinstance(value, (tuple, list)):
            hasher.update(repr(len(value)).encode())
            for one in value:
                add(one)
        elif isinstance(value, Tensor):
            hasher.update(repr((value.dtype, tuple(value.shape))).encode())
            hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            hasher.update(repr(value).encode())

    add(list(batches))
    return hasher.hexdigest()


def output_of(output: Any) -> Tensor:
    """The tensor a network's output is compared by: itself, its `logits`, or its first tensor.

    Raises ModelError where there is none.
    """
    named = getattr(output, "logits", output)
    found = next((tensor for tensor in tensors_in(named) if tensor.is_floating_point()), None)
    if found is None:
        raise ModelError(f"the model returns {type(output).__name__}, which holds no floating tensor to compare")
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        parts: Any = value.values()
    elif isinstance(value, (tuple, list)):
        parts = value
    else:
        parts = vars(value).values() if hasattr(value, "__dataclass_fields__") else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def same(outputs: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether outputs are the same but for rounding."""
    if [one.shape for one in outputs] != [one.shape for one in wanted]:
        return False
    for one, other in zip(outputs, wanted, strict=True):
        if one.is_floating_point():
            scale = float(other.abs().nan_to_num(posinf=0).max()) if other.numel() else 0.0
            if not torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True):
                return False
    return True
