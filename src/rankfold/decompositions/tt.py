"""Tensor train: a 1×1 convolution, one stage for each tap axis, and a 1×1 convolution back.

Oseledets, SIAM J. Sci. Comput. 33 (2011). The weight is read as inputs, taps, outputs. Its first and last bonds get
fixed orthonormal bases (those of the inputs and the outputs), the bonds between the taps the singular vectors of the
core in these bases. For every candidate the error counted is that of a train which exists: the core projected onto its
leading singular vectors, cut to the leading rows and columns; `factors` then takes the best middle bonds for the cut
core, which is never worse (TT-SVD). With one tap axis there is no bond in between, and this is Tucker-2. As there, the
closed form is left as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64
from torch import Tensor

from rankfold.decompositions.expansion import (
    Decomposition,
    Expansion,
    Factors,
    Grid,
    discarded,
    leading_basis,
    spread,
    unfold,
)
from rankfold.decompositions.wiring import TAPS, Wiring

_CANDIDATES = 262_144
"""Candidates of one grid, at most; along longer bonds evenly spaced ranks stand for all."""


class TrainExpansion(Expansion):
    """Bases of inputs and outputs, and the core (g, a, taps…, z) in them."""

    def __init__(self, weight: Float64[Tensor, "g o i *taps"], wiring: Wiring, precise: bool) -> None:
        self.wiring = wiring
        axes = "oi" + "".join(axis for axis in TAPS if axis in "".join(wiring.factors))
        _, self.inputs = leading_basis(unfold(weight, axes, "i"), precise)
        self._train = Train(torch.einsum("goi...,giA->gAo...", weight, self.inputs).movedim(2, -1), precise)

    def grids(self) -> tuple[Grid, ...]:
        return (self._train.grid(),)

    def max_ranks(self) -> tuple[int, ...]:
        return self._train.max_ranks()

    def factors(self, ranks: Sequence[int]) -> Factors:
        taps, outputs = self._train.factors(ranks)
        return self.inputs[..., : ranks[0]].mT, *taps, outputs


class Train:
    """A tensor (g, a, taps…, o) whose first axis is ordered by importance already, as a train from the first tap on."""

    def __init__(self, tensor: Float64[Tensor, "g a *taps o"], precise: bool) -> None:
        self._precise = precise
        self._total = float(tensor.square().sum())
        groups, outputs = len(tensor), tensor.shape[-1]
        _, self._outputs = leading_basis(tensor.reshape(groups, -1, outputs).mT, precise)
        self._core = tensor @ self._outputs.reshape(groups, *[1] * (tensor.ndim - 3), outputs, -1)

    def max_ranks(self) -> tuple[int, ...]:
        """Largest useful rank of each bond: first, those between the taps, last."""
        shape = self._core.shape[1:]
        middle = (min(int(np.prod(shape[:cut])), int(np.prod(shape[cut:]))) for cut in range(2, len(shape) - 1))
        return shape[0], *middle, shape[-1]

    def grid(self) -> Grid:
        """Errors of the trains described in this module's head, on a grid of at most 262,144 candidates."""
        largest = self.max_ranks()
        most = int(_CANDIDATES ** (1 / len(largest)) + 1e-9)
        ranks = tuple(spread(size, most) for size in largest)
        cut = discarded(self._energy(self._core))[np.ix_(ranks[0] - 1, ranks[-1] - 1)]
        errors = np.empty([len(axis) for axis in ranks])
        for middle, projected in self._projected(self._core, ranks[1:-1]):
            inside = (
                self._energy(self._core - projected)
                .cumsum(0)
                .cumsum(1)
                .cpu()
                .numpy()[np.ix_(ranks[0] - 1, ranks[-1] - 1)]
            )
            errors[(slice(None), *middle, slice(None))] = cut + inside
        errors /= max(self._total, 1e-300)
        for axis in range(errors.ndim):
            errors = np.minimum.accumulate(errors, axis=axis)
        return Grid(ranks, np.minimum(errors, 1.0))

    def factors(self, ranks: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """The tap factors, axes (out bond, in bond, tap), and the output factor (o, bond).

        Ranks above those of any use are filled up with zeros.
        """
        left, right = ranks[0], ranks[-1]
        rest = filled(self._core[:, :left, ..., :right], right)
        rest = filled(rest.movedim(1, -1), left).movedim(-1, 1)
        groups, bond, factors = len(rest), left, []
        for rank in ranks[1:-1]:
            taps = rest.shape[2]
            matrix = rest.reshape(groups, bond * taps, -1)
            _, basis = leading_basis(matrix, self._precise)
            basis = filled(basis[..., :rank], rank)
            factors.append(basis.reshape(groups, bond, taps, rank).permute(0, 3, 1, 2))
            rest, bond = (basis.mT @ matrix).reshape(groups, rank, *rest.shape[3:]), rank
        factors.append(rest.permute(0, 3, 1, 2))
        return factors, filled(self._outputs[..., :right], right)

    def _energy(self, core: Tensor) -> Float64[Tensor, "a z"]:
        """Energy per pair of first and last index, over groups and taps."""
        return core.square().flatten(2, -2).sum((0, 2)) if core.ndim > 3 else core.square().sum(0)

    def _projected(
        self, core: Tensor, middle: Sequence[npt.NDArray[np.int64]], cut: int = 0
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """The core projected onto the leading singular vectors of its cuts between the taps, from `cut` on, at each of
        their ranks, by the places of these.

        The first cut projects from the left, a second one from the right: two projections that commute. From rank to
        rank what the vectors between them make is added.
        """
        if not middle:
            yield (), core
            return
        basis = self._cut_basis(cut)
        matrix = (
            core.reshape(len(core), basis.shape[1], -1) if cut == 0 else core.reshape(len(core), -1, basis.shape[1])
        )
        kept = torch.zeros_like(matrix)
        for place, (start, end) in enumerate(itertools.pairwise([0, *map(int, middle[0])])):
            added = basis[..., start:end]
            left, right = (added, added.mT @ matrix) if cut == 0 else (matrix @ added, added.mT)
            kept.baddbmm_(left, right)
            for behind, projected in self._projected(kept.reshape(core.shape), middle[1:], cut + 1):
                yield (place, *behind), projected

    def _cut_basis(self, cut: int) -> Tensor:
        """Leading basis of the rows before the first cut, or of the columns behind the second one."""
        if not hasattr(self, "_bases"):
            core, groups = self._core, len(self._core)
            self._bases = [leading_basis(core.reshape(groups, core.shape[1] * core.shape[2], -1), self._precise)[1]]
            if core.ndim > 5:
                behind = core.reshape(groups, -1, core.shape[-2] * core.shape[-1]).mT
                self._bases.append(leading_basis(behind, self._precise)[1])
        return self._bases[cut]


def filled(tensor: Tensor, size: int) -> Tensor:
    """The tensor with zeros behind its last axis, up to `size`."""
    return torch.nn.functional.pad(tensor, (0, max(0, size - tensor.shape[-1])))


def _wiring(taps: str) -> Wiring:
    bonds = "ABCD"[: len(taps) + 1]
    chain = [f"{bonds[k + 1]}{bonds[k]}{axis}" for k, axis in enumerate(taps)]
    return Wiring(("Ai", *chain, f"o{bonds[-1]}"))


TT = Decomposition(name="tt", wiring=_wiring, expand=TrainExpansion, balanced=True)
