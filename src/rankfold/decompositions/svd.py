"""Two factors and one bond: the truncated singular value decomposition of one unfolding of the weight.

`svd` unfolds a convolution's weight as outputs × (inputs and taps): a k×k convolution to A channels, then a 1×1. The
truncation is the best one of its rank in the Frobenius norm (Eckart and Young, 1936). On layers without taps every
decomposition comes down to this one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from rankfold.decompositions.expansion import Decomposition, Expansion, Factors, Grid, leading_basis, tail_sums, unfold
from rankfold.decompositions.wiring import TAPS, Wiring


class TwoFactorExpansion(Expansion):
    """Singular vectors of the unfolding between the first factor's weight axes and the second's."""

    def __init__(self, weight: Float64[Tensor, "g o i *taps"], wiring: Wiring, precise: bool) -> None:
        self.wiring = wiring
        first, second = (factor.replace("A", "") for factor in wiring.factors)
        axes = "oi" + "".join(axis for axis in TAPS if axis in first + second)
        matrix = unfold(weight, axes, first)
        self._transposed = matrix.shape[1] > matrix.shape[2]
        if self._transposed:
            matrix = matrix.mT
        self._energies, self._basis = leading_basis(matrix, precise)
        self._projected = self._basis.mT @ matrix
        self._total = float(weight.square().sum())
        sizes = {axis: weight.shape[1 + axes.index(axis)] for axis in axes}
        self._shapes = tuple(tuple(sizes[axis] for axis in letters) for letters in (first, second))

    def grids(self) -> tuple[Grid, ...]:
        errors = tail_sums(self._energies.sum(0)) / max(self._total, 1e-300)
        return (Grid((np.arange(1, len(errors) + 1),), np.minimum(errors, 1.0)),)

    def max_ranks(self) -> tuple[int, ...]:
        return (self._energies.shape[-1],)

    def factors(self, ranks: Sequence[int]) -> Factors:
        (rank,) = ranks
        near, far = self._basis[..., :rank].mT, self._projected[:, :rank]  # both (g, A, axes)
        first, second = (far, near) if self._transposed else (near, far)
        groups = len(first)
        first = first.reshape(groups, rank, *self._shapes[0])
        second = second.reshape(groups, rank, *self._shapes[1])
        letters = "A" + self.wiring.factors[1].replace("A", "")
        return first, second.permute(0, *(1 + letters.index(axis) for axis in self.wiring.factors[1]))


SVD = Decomposition(
    name="svd",
    wiring=lambda taps: Wiring((f"Ai{taps}", "oA")),
    expand=TwoFactorExpansion,
)
