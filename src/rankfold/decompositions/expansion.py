"""The interface every decomposition implements: a closed-form expansion of a weight whose prefixes are its ranks.

Weights here are float64 tensors of shape (g, o, i, *taps): groups, outputs and inputs per group, and one axis for every
kernel axis with more than one tap. Groups are decomposed side by side, at common ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rankfold.decompositions.wiring import Wiring

Factors = tuple[Tensor, ...]
"""One tensor per factor of the wiring, its axes in the wiring's letters behind a leading group axis."""


@dataclass(frozen=True)
class Grid:
    """Squared relative Frobenius errors on a grid of ranks.

    `errors` has one axis per bond; along it stand the ranks of that bond in `ranks`, in rising order.
    """

    ranks: tuple[npt.NDArray[np.int64], ...]
    errors: npt.NDArray[np.float64]


class Expansion(ABC):
    """A weight expanded once, from which the factors at any ranks are read off.

    Errors never rise with a rank and bound the error of `factors` at the same ranks from above; in the families of an
    optimistic decomposition they bound what any fit can reach from below.
    """

    wiring: Wiring

    @abstractmethod
    def grids(self) -> tuple[Grid, ...]:
        """Error per candidate; several grids where the range of one bond depends on another."""

    @abstractmethod
    def max_ranks(self) -> tuple[int, ...]:
        """Ranks at which the factors reproduce the weight; more are of no use."""

    @abstractmethod
    def factors(self, ranks: Sequence[int]) -> Factors:
        """The closed-form factors at `ranks`, one rank per bond."""


@dataclass(frozen=True)
class Decomposition:
    """A row of the table: a name, the wiring for given taps, and the expansion of a weight along it.

    `sweeps` is how many rounds of alternating least squares follow the closed form, at most, where `family` names a
    family for the ranks; where it gives None the closed form is the best, or better left alone. The errors of a family
    are known from fits at `knots` candidates, by a third as many rounds, and interpolated between them. `optimistic`
    says that before a fit they are bounds from below, not what the closed form reaches. `balanced` restricts a search
    to ranks whose first and last bond keep about the same share of inputs and outputs (see
    `search.candidates.BALANCE`). `expand` takes the weight, the wiring and whether to avoid Gram matrices
    (`leading_basis`).
    """

    name: str
    wiring: Callable[[str], Wiring]
    expand: Callable[[Tensor, Wiring, bool], Expansion]
    sweeps: int = 0
    knots: int = 0
    family: Callable[[Sequence[int]], str | None] = lambda ranks: None
    optimistic: bool = False
    balanced: bool = False


def leading_basis(
    matrix: Float[Tensor, "*batch n m"], precise: bool
) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch n k"]]:
    """Energies (squared singular values, falling) and left singular vectors, k = min(n, m) of them.

    By the eigenvectors of the smaller Gram matrix: for 512×4608 a tenth of the time of an SVD. Squaring costs half the
    digits: singular values below about 1e-8 of the largest are lost in rounding, so relative errors are right down to
    about 1e-7. That is below the resolution of float32, but not of float64; `precise` takes the SVD instead.
    """
    n, m = matrix.shape[-2:]
    if precise:
        basis, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return values.square(), basis
    if n <= m:
        energies, basis = torch.linalg.eigh(matrix @ matrix.mT)
        return energies.flip(-1).clamp_min(0), basis.flip(-1)
    energies, right = torch.linalg.eigh(matrix.mT @ matrix)
    basis, _ = torch.linalg.qr(matrix @ right.flip(-1))
    return energies.flip(-1).clamp_min(0), basis


def unfold(weight: Tensor, axes: str, rows: str) -> Float[Tensor, "g n m"]:
    """Matrix per group with the axes in `rows` as rows, in that order, and the others as columns.

    `axes` are the weight's letters behind its group axis.
    """
    columns = "".join(axis for axis in axes if axis not in rows)
    permuted = weight.permute(0, *(1 + axes.index(axis) for axis in rows + columns))
    return permuted.reshape(weight.shape[0], int(np.prod(permuted.shape[1 : 1 + len(rows)])), -1)


def tail_sums(values: Tensor) -> npt.NDArray[np.float64]:
    """Sums of the entries behind the first 1, 2, …, n of a vector; the last is zero."""
    tails = values.flip(0).cumsum(0).flip(0)
    return np.append(tails[1:].cpu().numpy(), 0.0)


def discarded(energy: Float64[Tensor, "a b"]) -> npt.NDArray[np.float64]:
    """Entry [a, b]: the sum of `energy` outside its first a+1 rows and b+1 columns, as sums of positive terms."""
    table = energy.cpu().numpy()
    rows = np.append(np.cumsum(table.sum(1)[::-1])[::-1][1:], 0.0)
    columns = np.cumsum(table[:, ::-1], axis=1)[:, ::-1]
    columns = np.append(columns[:, 1:], np.zeros((len(table), 1)), axis=1)
    return np.asarray(rows[:, None] + np.cumsum(columns, axis=0))


def spread(largest: int, most: int) -> npt.NDArray[np.int64]:
    """At most `most` ranks from 1 to `largest`, both included: all of them, or evenly spaced ones."""
    if largest <= most:
        return np.arange(1, largest + 1)
    return np.unique(np.linspace(1, largest, most).round().astype(np.int64))
