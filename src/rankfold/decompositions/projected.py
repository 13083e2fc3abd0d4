"""The factors that hold the outputs, solved for exactly in the metric with the others as they are.

The outputs have no metric of their own, so the best factor next to them is a regression of W x on what the others make
of x: with K the weight that they stand for, one row per open letter, X = W Σ Kᵀ (K Σ Kᵀ)⁻¹ (variable projection; Golub
and Pereyra, SIAM J. Numer. Anal. 10 (1973)). Where the last bond is shared with the factor before alone, as in Tucker
and trains, both are solved for at once: the same regression, of the rank of that bond (Izenman, J. Multivariate Anal. 5
(1975)), which is K's for all other letters of the two, projected on the leading eigenvectors of X K Σ Kᵀ Xᵀ.

From the closed forms of `whitening` this gets as close as sixty steps of L-BFGS on all factors, by two products with Σ:
ResNet-50's `layer3.2.conv2`, Tucker at 15 %: squared errors of 0.0725 before, 0.0607 after, and 0.0607 after the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from rankfold.decompositions.contractions import reconstruct
from rankfold.decompositions.expansion import Factors
from rankfold.decompositions.metric import Moment
from rankfold.decompositions.wiring import Wiring

LARGEST = 4608
"""Rows of K, at most; with more of them the factors stay as they are."""
RIDGES = {torch.float64: 1e-10, torch.float32: 1e-6}
"""Share of the mean square that is added to K Σ Kᵀ, by the dtype of the products; it damps what changes, no more."""


def projected(
    weight: Float64[Tensor, "g o i *taps"], wiring: Wiring, factors: Factors, moment: Moment, *, dtype: torch.dtype
) -> Factors:
    """The factors with the last, or the last two, as good as they can be in the metric of `moment`.

    Products are taken in `dtype`, solves in float64.
    """
    found = _regressed(weight, wiring, factors, moment, dtype)
    return factors if found is None else found.factors


def projected_loss(
    weight: Float64[Tensor, "g o i *taps"],
    wiring: Wiring,
    factors: Factors,
    moment: Moment,
    *,
    dtype: torch.dtype,
    energy: float,
) -> float | None:
    """E‖(W − Ŵ) x‖² of the `projected` factors, from that of W, which is their `energy`; None where none are found.

    It takes no further product with the moment: of the regression all that counts is known.
    """
    found = _regressed(weight, wiring, factors, moment, dtype)
    return None if found is None else max(energy - found.gained(), 0.0)


@dataclass(frozen=True)
class _Regression:
    """Factors whose last ones are solved for, as X that is `made`, with K Σ Kᵀ as `square` and W Σ Kᵀ as `wanted`."""

    factors: Factors
    made: Float64[Tensor, "g o n"]
    square: Float64[Tensor, "g n n"]
    wanted: Float64[Tensor, "g o n"]

    def gained(self) -> float:
        """E‖W x‖² − E‖(W − Ŵ) x‖²: twice the product of what is wanted and what comes out, less that of the latter."""
        return float((self.made * (2 * self.wanted - self.made @ self.square)).sum())


def _regressed(
    weight: Float64[Tensor, "g o i *taps"], wiring: Wiring, factors: Factors, moment: Moment, dtype: torch.dtype
) -> _Regression | None:
    """The regression; None where it is too large or has no solution."""
    last, before = wiring.factors[-1], wiring.factors[-2]
    jointly = len(last) == 2 and len(wiring.factors) > 2 and "".join(wiring.factors).count(last.replace("o", "")) == 2
    near, first = (before, last.replace("o", "")) if jointly else (last, "o")
    inner, letters = len(factors) - (2 if jointly else 1), near.replace(first, "")
    held = _matrix(factors[inner], near, first + letters)
    now = _matrix(factors[-1], last, "o" + first) @ held if jointly else held
    groups, _, side = now.shape
    if side > LARGEST:
        return None

    sizes = [factors[inner].shape[1 + near.index(letter)] for letter in letters]
    identity = torch.eye(side, dtype=now.dtype, device=now.device).expand(groups, -1, -1).reshape(groups, side, *sizes)
    made = reconstruct(Wiring((*wiring.factors[:inner], "o" + letters)), (*factors[:inner], identity)).to(dtype)
    seen = moment.applied(made).flatten(2)
    square = (seen @ made.flatten(2).mT).double()
    wanted = (weight.to(dtype).flatten(2) @ seen.mT).double()
    mean = square.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)[:, None, None]
    triangle, failed = torch.linalg.cholesky_ex(square + RIDGES[dtype] * mean * torch.eye(side).to(square))
    if failed.any():
        return None
    best = now + torch.cholesky_solve((wanted - now @ square).mT, triangle).mT
    if not jointly:
        return _Regression((*factors[:-1], _factor(best, last, "o" + letters, sizes)), best, square, wanted)
    vectors = torch.linalg.eigh(best @ square @ best.mT).eigenvectors[..., -held.shape[1] :]
    rows = vectors.mT @ best
    pair = _factor(rows, near, first + letters, sizes), _factor(vectors, last, "o" + first, [vectors.shape[-1]])
    return _Regression((*factors[:inner], *pair), vectors @ rows, square, wanted)


def _matrix(factor: Tensor, letters: str, order: str) -> Float64[Tensor, "g n m"]:
    """A factor with its axes in another order, the first of them as rows."""
    return factor.permute(0, *(1 + letters.index(letter) for letter in order)).flatten(2)


def _factor(matrix: Float64[Tensor, "g n m"], letters: str, order: str, sizes: Sequence[int]) -> Tensor:
    """The factor that such a matrix is of, its columns' axes being of some sizes."""
    axes = matrix.reshape(*matrix.shape[:2], *sizes)
    return axes.permute(0, *(1 + order.index(letter) for letter in letters))
