"""Sums of outer products of patches, which moments are made of, in as much memory as their size calls for."""

from __future__ import annotations

import copy
from functools import partial
from typing import cast

import torch
from torch import Tensor

from rankfold.decompositions.metric import Moment
from rankfold.decompositions.wiring import LayerShape

LARGEST_MOMENT = 4608
"""Side of the largest moment kept whole (85 MB).

A larger one is the Kronecker product of two; without taps a few rows stand for all of it, sums of patches with random
signs, whose expected outer product is theirs (Johnson and Lindenstrauss; Woodruff, arXiv 1411.4357, section 2).
"""
LARGEST_DOUBLE = 2048
"""Side up to which a moment is in float64."""
LARGEST_SKETCH = 1024
"""Rows that are kept of the inputs of a Linear whose moment is larger than that, patches or sums of them."""
SKETCH = f"a sketch of at most {LARGEST_SKETCH} rows"
PRODUCT = "the Kronecker product of the inputs' moment and the taps'"
BLOCKS, SMALLEST_BLOCK = 8, 128
"""Blocks of columns in which a product is made, of each what lies below the diagonal; and the fewest columns of one."""
UNSEEN = 0.1
"""Share of the mean over experts that is added to the moment of each: one that saw no inputs has some metric then."""


class MomentSum:
    """A running sum of outer products, in float64, or in float32 where they are large, on the device of the patches."""

    def __init__(self, layer: LayerShape, device: torch.device) -> None:
        groups, inputs = layer.groups, layer.inputs
        taps = layer.params // (groups * layer.outputs * inputs)
        self.shape, self.device = (groups, inputs, taps), device
        whole = inputs * taps <= LARGEST_MOMENT or layer.routed
        dtype = torch.float64 if inputs * taps <= LARGEST_DOUBLE else torch.float32
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.joint = zeros(groups, inputs * taps, inputs * taps, dtype=dtype) if whole else None
        self.rows: list[Tensor] | None = None if whole or taps > 1 else []
        split = not whole and taps > 1
        self.inputs = zeros(groups, inputs, inputs) if split else None
        self.taps = zeros(groups, taps, taps) if split else None
        self.sum = zeros(groups, inputs * taps) if self.rows is None else None
        self.positions, self.total, self.squares = 0, 0.0, 0.0
        self.routed = layer.routed

    def add(self, patches: Tensor, group: int | None = None, weights: Tensor | None = None) -> None:
        """Adds patches (g, positions, inputs × taps), or those (1, …) of one of the groups, each with its weight."""
        positions = patches.shape[1]
        patches = patches.float() if patches.dtype in (torch.float16, torch.bfloat16) else patches
        self.positions += positions
        self.total += positions if weights is None else float(weights.sum())
        self.squares += positions if weights is None else float(weights.square().sum())
        weighted = patches if weights is None else patches * weights[:, None]
        places = slice(None) if group is None else slice(group, group + 1)
        if self.sum is not None:
            self.sum[places] += weighted.sum(1).double()
        if self.joint is not None:
            joint, size = self.joint[places], self.joint.shape[-1]
            width = max(SMALLEST_BLOCK, size // BLOCKS)
            for start in range(0, size, width):
                block = weighted[..., start : start + width]
                own, transposed = joint[:, start:, start : start + width], patches[..., start:].mT
                if own.dtype == block.dtype:
                    own.baddbmm_(transposed, block)
                else:
                    own += transposed @ block
            return
        if self.rows is not None:
            self.rows.append((patches if weights is None else patches * weights.sqrt()[:, None]).float())
            if sum(one.shape[1] for one in self.rows) > LARGEST_SKETCH:
                self.rows = [_sketched(torch.cat(self.rows, 1), self.positions)]
            return
        split = patches.reshape(len(patches), positions, *self.shape[1:])
        by_inputs, by_taps = split.movedim(3, 2).flatten(1, 2), split.flatten(1, 2)
        cast(Tensor, self.inputs).add_((by_inputs.mT @ by_inputs).double())
        cast(Tensor, self.taps).add_((by_taps.mT @ by_taps).double())

    def __add__(self, other: MomentSum) -> MomentSum:
        """The sum over the patches of both."""
        total = copy.copy(self)
        for name in ("joint", "sum", "inputs", "taps", "rows"):
            own = getattr(self, name)
            setattr(total, name, None if own is None else own + getattr(other, name))
        for name in ("positions", "total", "squares"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    @property
    def count(self) -> float:
        """What a sum is divided by for its mean: all weights together."""
        return self.total or 1.0

    @property
    def effective(self) -> int:
        """How many positions would tell as much if all counted alike."""
        return round(self.total**2 / (self.squares or 1.0))

    @property
    def nbytes(self) -> int:
        """Bytes that the sum takes, at most."""
        kept = [tensor for tensor in (self.joint, self.sum, self.inputs, self.taps) if tensor is not None]
        rows = 0 if self.rows is None else 8 * LARGEST_SKETCH * self.shape[1]
        return sum(tensor.nbytes for tensor in kept) + rows

    @property
    def finite(self) -> bool:
        """Whether everything that was added was finite."""
        kept = [tensor for tensor in (self.joint, self.inputs, self.taps, *(self.rows or ())) if tensor is not None]
        return all(bool(torch.isfinite(tensor).all()) for tensor in kept)

    def moment(self) -> Moment:
        """The mean outer product, and how many positions tell it."""
        count, positions = self.count, self.effective
        if self.joint is not None:
            joint = self.joint.tril().div_(count)
            joint += joint.tril(-1).mT
            if self.routed:
                joint = joint + UNSEEN * joint.mean(0, keepdim=True)
            mean = None if self.routed else cast(Tensor, self.sum) / count
            return Moment(joint=joint, positions=positions, mean=mean)
        if self.rows is not None:
            return Moment(rows=torch.cat(self.rows, 1) / count**0.5, positions=positions)
        _, inputs, taps = self.shape
        by_inputs, by_taps = cast(Tensor, self.inputs) / (count * taps), cast(Tensor, self.taps) / (count * inputs)
        square = by_taps.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)[:, None, None]
        return Moment(inputs=by_inputs, taps=by_taps / square, positions=positions)


def _sketched(rows: Tensor, seed: int) -> Tensor:
    """Half of `LARGEST_SKETCH` sums of rows (g, k, n), each with random signs, scaled to the outer product's size."""
    count = LARGEST_SKETCH // 2
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (count, rows.shape[1]), generator=generator).to(rows) * 2 - 1
    return signs @ rows / count**0.5
