"""CP (canonical polyadic): a 1×1 convolution to A channels, a depthwise k×1, a depthwise 1×k, and a 1×1 back.

Lebedev et al., arXiv 1412.6553. A CP decomposition has no closed form, but a good start has: rotate every tap axis into
its principal directions, so that the weight becomes a sum of outputs × inputs matrices, one per combination of
directions, and keep the largest singular triplets of all these matrices together. Each is a rank-one term of the weight
and they are orthogonal to each other, so the error of every rank follows at once; with all of them it is zero, also
beyond the largest size of an axis, where random starts are the custom. Alternating least squares takes it from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from rankfold.decompositions.expansion import (
    Decomposition,
    Expansion,
    Factors,
    Grid,
    leading_basis,
    tail_sums,
    unfold,
)
from rankfold.decompositions.wiring import TAPS, Wiring


class CpExpansion(Expansion):
    """Rank-one terms, the largest first, that add up to the weight and are orthogonal to each other."""

    def __init__(self, weight: Float64[Tensor, "g o i *taps"], wiring: Wiring, precise: bool) -> None:
        self.wiring = wiring
        parts = [factor.replace("A", "") for factor in wiring.factors[1:-1]]
        taps = "".join(axis for axis in TAPS if axis in "".join(parts))
        groups, outputs, inputs = weight.shape[:3]
        self._total = float(weight.square().sum())
        bases = [leading_basis(unfold(weight, "oi" + taps, part), precise)[1] for part in parts]
        sizes = [tuple(weight.shape[3 + taps.index(axis)] for axis in part) for part in parts]

        core = weight.reshape(groups, outputs, inputs, *(int(np.prod(size)) for size in sizes))
        for axis, basis in enumerate(bases):
            core = torch.einsum("gt...,gts->gs...", core.movedim(3 + axis, 1), basis).movedim(1, 3 + axis)
        slices = core.flatten(3).permute(0, 3, 1, 2)  # one outputs × inputs matrix per combination of directions
        energies, left = leading_basis(slices, precise)
        right = left.mT @ slices

        self._energies, order = energies.flatten(1).sort(dim=1, descending=True, stable=True)
        self._outputs = _pick(left.permute(0, 1, 3, 2).flatten(1, 2), order)
        self._inputs = _pick(right.flatten(1, 2), order)
        directions = [basis.shape[2] for basis in bases]
        chosen = np.unravel_index((order // energies.shape[2]).cpu().numpy(), directions)
        self._taps = [
            _pick(basis.mT, torch.as_tensor(index, device=weight.device)).reshape(groups, -1, *size)
            for basis, index, size in zip(bases, chosen, sizes, strict=True)
        ]
        self._useful = max(1, weight[0].numel() // (outputs + inputs + sum(int(np.prod(size)) for size in sizes)))

    def grids(self) -> tuple[Grid, ...]:
        errors = tail_sums(self._energies.sum(0)) / max(self._total, 1e-300)
        most = min(len(errors), self._useful)
        return (Grid((np.arange(1, most + 1),), np.minimum(errors[:most], 1.0)),)

    def max_ranks(self) -> tuple[int, ...]:
        return (self._energies.shape[1],)

    def factors(self, ranks: Sequence[int]) -> Factors:
        (rank,) = ranks
        taps = [factor[:, :rank] for factor in self._taps]
        return self._inputs[:, :rank], *taps, self._outputs[:, :rank].mT


def _pick(rows: Float64[Tensor, "g n m"], order: Tensor) -> Float64[Tensor, "g k m"]:
    """Rows of each group in the given order."""
    return rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2]))


CP = Decomposition(
    name="cp",
    wiring=lambda taps: Wiring(("Ai", *(f"A{axis}" for axis in taps), "oA")),
    expand=CpExpansion,
    sweeps=50,
    knots=3,
    family=lambda ranks: "cp",
)
