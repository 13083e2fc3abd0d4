"""Tensor ring: a tensor train whose last factor is tied back to the first by one more bond, carried in the batch.

Zhao et al., arXiv 1606.05535. For a given size of the carried bond A the weight's input basis (its left singular
vectors, the largest first) is folded into A × B, component b·A + a, and what follows is a tensor train over B, the taps
and outputs × A: the TR-SVD of that paper with its first split made explicit. A ring with A = 1 is a train; it is among
the candidates, so that a ring is never worse.

With A > 1 that closed form is far from the best. What a ring (A, B, C, …) can reach at most is the train with the ranks
(A·B, A·C, …), of which it is a special case; that error stands for it until it is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from rankfold.decompositions.expansion import Decomposition, Expansion, Factors, Grid, leading_basis, unfold
from rankfold.decompositions.tt import Train, filled
from rankfold.decompositions.wiring import TAPS, Wiring

CARRIED = (1, 2, 4)
"""Sizes of the carried bond that are candidates; `factors` takes any."""


class RingExpansion(Expansion):
    """The input basis, and a train for each size of the carried bond."""

    def __init__(self, weight: Float64[Tensor, "g o i *taps"], wiring: Wiring, precise: bool) -> None:
        self.wiring = wiring
        self._precise = precise
        axes = "oi" + "".join(axis for axis in TAPS if axis in "".join(wiring.factors))
        _, self._inputs = leading_basis(unfold(weight, axes, "i"), precise)
        self._core = torch.einsum("goi...,giA->gAo...", weight, self._inputs).movedim(2, -1)  # (g, a, taps, o)
        self._trains: dict[int, Train] = {}

    def grids(self) -> tuple[Grid, ...]:
        train = self._train(1).grid()
        grids = [Grid((np.array([1]), *train.ranks), train.errors[None])]
        for carried in CARRIED[1:]:
            if carried <= self._core.shape[1]:
                largest = self._train(carried).max_ranks()
                ranks = [axis[axis <= most] for axis, most in zip(train.ranks, largest, strict=True)]
                unfolded = [
                    np.minimum(np.searchsorted(known, carried * axis), len(known) - 1)
                    for known, axis in zip(train.ranks, ranks, strict=True)
                ]
                grids.append(Grid((np.array([carried]), *ranks), train.errors[np.ix_(*unfolded)][None]))
        return tuple(grids)

    def max_ranks(self) -> tuple[int, ...]:
        return 1, *self._train(1).max_ranks()

    def factors(self, ranks: Sequence[int]) -> Factors:
        carried, first, *_ = ranks
        taps, outputs = self._train(carried).factors(ranks[1:])
        basis = filled(self._inputs, carried * first)[..., : carried * first]
        groups, inputs = basis.shape[:2]
        entry = basis.reshape(groups, inputs, first, carried).permute(0, 3, 1, 2)  # A i B
        chain = [factor.permute(0, 2, 3, 1) for factor in taps]  # (in bond, tap, out bond)
        outputs = outputs.reshape(groups, -1, carried, outputs.shape[-1]).permute(0, 3, 1, 2)  # D o A
        return entry, *chain, outputs

    def _train(self, carried: int) -> Train:
        """The train of the weight with the carried bond split off the inputs' axis and joined to the outputs'."""
        if carried not in self._trains:
            folds = -(-self._core.shape[1] // carried)
            core = filled(self._core.movedim(1, -1), folds * carried)
            split = core.reshape(*core.shape[:-1], folds, carried).movedim(-2, 1)  # (g, b, taps, o, a)
            self._trains[carried] = Train(split.flatten(-2), self._precise)
        return self._trains[carried]


def _wiring(taps: str) -> Wiring:
    bonds = "ABCDE"[: len(taps) + 2]
    chain = [f"{bonds[k + 1]}{axis}{bonds[k + 2]}" for k, axis in enumerate(taps)]
    return Wiring(("AiB", *chain, f"{bonds[-1]}oA"))


RING = Decomposition(
    name="ring",
    wiring=_wiring,
    expand=RingExpansion,
    sweeps=30,
    knots=3,
    family=lambda ranks: f"ring {ranks[0]}" if ranks[0] > 1 else None,
    optimistic=True,
    balanced=True,
)
