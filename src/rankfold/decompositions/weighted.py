"""Matrices in a metric: the whole curve, and the best factors of every rank, from one eigendecomposition.

Where the second factor is all that holds the outputs, and the first all that holds the inputs, the best factors are
known: with U the leading eigenvectors of W Σ Wᵀ, Ŵ = U Uᵀ W. (Minimise ‖(W − Ŵ) Σ^½‖ over Ŵ of rank r: Eckart and
Young give U Uᵀ W Σ^½, and that is reached. No inverse of Σ is taken, so it may be singular.) What is lost at a rank is
the sum of the eigenvalues behind it. Where outputs have a metric H, it is H^½ W that is so approximated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rankfold.decompositions.expansion import Expansion, Factors, Grid, leading_basis, tail_sums
from rankfold.decompositions.metric import Moment
from rankfold.decompositions.wiring import Wiring

LARGEST_EXACT = 1024
"""Side up to which eigenvectors are taken in float64; beyond, in float32, whose errors are about 1e-6 of the whole."""


def is_matrix(wiring: Wiring) -> bool:
    """Whether the wiring is a matrix of outputs by everything else."""
    return len(wiring.factors) == 2 and wiring.factors[1] == "oA"


class WeightedExpansion(Expansion):
    """Eigenvectors of W Σ Wᵀ, by falling eigenvalue, as many as are of use."""

    def __init__(self, weight: Float[Tensor, "g o i *taps"], wiring: Wiring, moment: Moment) -> None:
        self.wiring = wiring
        self._weight = weight = moment.counted(weight)
        self._root = moment.root
        outputs = weight.shape[1]
        columns = weight[0, 0].numel()
        if outputs > columns and moment.joint is not None:
            joint = moment.joint.to(weight.device)
            joint = joint if columns <= LARGEST_EXACT else joint.float()
            values, vectors = torch.linalg.eigh(joint)
            root = vectors * values.clamp_min(0).sqrt()[:, None]
            energies, self._basis = leading_basis(weight.flatten(2).to(root) @ root, False)
        else:
            product = moment.outer(weight)
            product = product if outputs <= LARGEST_EXACT else product.float()
            energies, vectors = torch.linalg.eigh(product)
            self._basis = vectors.flip(-1)[..., : min(outputs, columns)]
            energies = energies.flip(-1)[..., : min(outputs, columns)]
        self._energies = energies.double().clamp_min(0)
        self._basis = self._basis.to(
            weight.dtype
        ).contiguous()  # kept until the plan is made, so no larger than need be

    def grids(self) -> tuple[Grid, ...]:
        energies = self._energies.sum(0)
        errors = tail_sums(energies) / max(float(energies.sum()), 1e-300)
        return (Grid((np.arange(1, len(errors) + 1),), np.minimum(errors, 1.0)),)

    def max_ranks(self) -> tuple[int, ...]:
        return (self._basis.shape[-1],)

    def factors(self, ranks: Sequence[int]) -> Factors:
        (rank,) = ranks
        leading = self._basis[..., :rank]
        matrix = self._weight.flatten(2)
        rows = (leading.mT.to(matrix) @ matrix).double().reshape(len(matrix), rank, *self._weight.shape[2:])
        order = ["A", "i", *(axis for axis in self.wiring.factors[0] if axis not in "Ai")]
        columns = leading.double() if self._root is None else self._root[1].to(leading.device) @ leading.double()
        return rows.permute(0, *(1 + order.index(axis) for axis in self.wiring.factors[0])), columns
