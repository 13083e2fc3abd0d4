"""Patches: what a layer multiplies by its weight, cut out of its input, and how many of them are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.network.kinds import known_kind, shape_of

ENOUGH = 2**15
"""Patches of a convolution that are looked at in any case, where there are so many: neighbours overlap."""
ENOUGH_ROWS = 2**17
"""Inputs of a Linear that are: no two tokens are alike."""
PER_ENTRY = 8
"""Patches that are looked at for each of their entries."""
SPREAD = 4
"""Over how many times as many patches those that are looked at are spread: neighbours are alike."""
_CHUNK = 2**24
"""Entries of the patches that are cut out at a time."""


def patches_of(module: nn.Module, x: Tensor, thinning: slice = slice(None)) -> Iterator[Tensor]:
    """The patches a layer multiplies by its weight for an input, (g, positions, inputs × taps), some at a time.

    With a `thinning` those alone at some rows of the output, or some positions of a Linear.
    """
    kind, shape = known_kind(module), shape_of(module)
    if kind.axes == 0:
        flat = x.reshape(-1, x.shape[-1])[thinning]
        yield from (part[None] for part in flat.split(max(1, _CHUNK // x.shape[-1])))
        return
    batched = x if x.ndim == kind.axes + 2 else x[None]
    prepared = _spread(module, batched) if kind.transposed else _padded(module, batched)
    per_example = prepared[0].numel() * max(1, shape.params // (shape.groups * shape.outputs * shape.inputs))
    for part in prepared.split(max(1, _CHUNK // max(per_example, 1))):
        yield _cut(module, part, thinning)


def thinning_of(module: nn.Module, output: Tensor, number: int, batches: int) -> slice:
    """Which rows of an output of a layer, or positions of a Linear's, are looked at in one of so many batches.

    As many as there is need for: some times as many as they have entries tell their moment. The first row is another
    one in every batch.
    """
    axes, positions = known_kind(module).axes, _positions(module, output)
    rows = positions if axes == 0 else output.shape[-axes]
    step = min(positions * batches // _enough(module), rows)
    return slice(number % step, None, step) if step > 1 else slice(None)


def batches_needed(module: nn.Module, output: Tensor) -> int:
    """How many batches like one that gave an output hold the patches that are looked at, `SPREAD` times over."""
    return -(-SPREAD * _enough(module) // max(_positions(module, output), 1))


def _enough(module: nn.Module) -> int:
    """How many patches of a layer tell their moment."""
    shape = shape_of(module)
    columns = shape.params // max(shape.groups * shape.outputs, 1)
    return max(ENOUGH if known_kind(module).axes else ENOUGH_ROWS, PER_ENTRY * columns)


def _positions(module: nn.Module, output: Tensor) -> int:
    """How many patches an output is made of."""
    axes = known_kind(module).axes
    return output[..., 0].numel() if axes == 0 else output.numel() // output.shape[output.ndim - 1 - axes]


def _padded(module: nn.Module, x: Tensor) -> Tensor:
    """A convolution's input with its padding around it."""
    amounts = list(cast(Any, module)._reversed_padding_repeated_twice)
    mode = cast(str, module.padding_mode)
    return functional.pad(x, amounts, mode="constant" if mode == "zeros" else mode)


def _spread(module: nn.Module, x: Tensor) -> Tensor:
    """A transposed convolution's input with zeros between its entries and around it, to be cut at stride one."""
    conv = cast(Any, module)
    amounts: list[int] = []
    for axis, (stride, padding, extra, dilation, size) in enumerate(
        zip(conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.kernel_size, strict=True)
    ):
        spread = x.new_zeros([*x.shape[: 2 + axis], (x.shape[2 + axis] - 1) * stride + 1, *x.shape[3 + axis :]])
        spread[(slice(None),) * (2 + axis) + (slice(None, None, stride),)] = x
        x = spread
        around = dilation * (size - 1) - padding
        amounts = [around, around + extra, *amounts]
    return functional.pad(x, amounts)


def _cut(module: nn.Module, x: Tensor, thinning: slice) -> Tensor:
    """The patches of a padded input, (g, positions, inputs × taps)."""
    kind, conv, groups = known_kind(module), cast(Any, module), shape_of(module).groups
    for axis in range(kind.axes):
        size, dilation = conv.kernel_size[axis], conv.dilation[axis]
        stride = 1 if kind.transposed else conv.stride[axis]
        taps = torch.arange(size, device=x.device) * dilation
        taps = taps.flip(0) if kind.transposed else taps
        count = (x.shape[2 + axis] - dilation * (size - 1) - 1) // stride + 1
        chosen = torch.arange(count, device=x.device)[thinning if axis == 0 else slice(None)]
        places = chosen[:, None] * stride + taps
        x = x.index_select(2 + axis, places.flatten()).unflatten(2 + axis, (len(chosen), size)).movedim(3 + axis, -1)
    batch, channels = x.shape[:2]
    x = x.reshape(batch, groups, channels // groups, -1, *conv.kernel_size).movedim(3, 1)  # b, positions, g, i, taps
    return x.movedim(2, 0).flatten(1, 2).flatten(2)
