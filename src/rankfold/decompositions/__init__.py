"""The table of decompositions, and the two things done with any of them: expand a weight, and fit its factors.

Adding a decomposition is one file beside this one and one line in the table; every search, layer kind and test takes it
from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from rankfold.decompositions.als import WORK, WORK_TO_MEASURE, alternate, balance, relative_error, scaled_gradients
from rankfold.decompositions.contractions import is_polyadic, reconstruct
from rankfold.decompositions.cp import CP
from rankfold.decompositions.cp3 import CP3
from rankfold.decompositions.damped import damped, sensitivity
from rankfold.decompositions.expansion import Decomposition, Expansion, Factors, Grid
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.decompositions.refine import energy_of, metric_error, reached_error, refine
from rankfold.decompositions.ring import RING
from rankfold.decompositions.spatial import SPATIAL
from rankfold.decompositions.svd import SVD
from rankfold.decompositions.tt import TT
from rankfold.decompositions.tucker import TUCKER
from rankfold.decompositions.weighted import WeightedExpansion, is_matrix
from rankfold.decompositions.whitening import WhitenedExpansion, Whitening
from rankfold.decompositions.wiring import MATRIX, LayerShape, Wiring
from rankfold.errors import PlanError, UnknownNameError

__all__ = [
    "DECOMPOSITIONS",
    "Decomposition",
    "Expansion",
    "Factors",
    "Grid",
    "balance",
    "damped",
    "decomposition",
    "energy_of",
    "expand",
    "family_of",
    "fit",
    "fitted_error",
    "is_matrix",
    "is_polyadic",
    "metric_error",
    "reconstruct",
    "relative_error",
    "scaled_gradients",
    "sensitivity",
    "wiring_of",
]

DECOMPOSITIONS: dict[str, Decomposition] = {d.name: d for d in (SVD, SPATIAL, TUCKER, TT, CP, CP3, RING)}


_PATIENCE = 4
"""Rounds of a random start, as a multiple of those from the closed form, which is closer to the end."""
_AGREEMENT = 0.005
"""Relative difference up to which starts are taken to have found the same error."""


def decomposition(name: str) -> Decomposition:
    """The decomposition called `name`; raises UnknownNameError, with the nearest names, where there is none."""
    if name not in DECOMPOSITIONS:
        raise UnknownNameError("decomposition", name, DECOMPOSITIONS)
    return DECOMPOSITIONS[name]


def wiring_of(name: str, shape: LayerShape) -> Wiring:
    """The wiring of a decomposition on a layer: on one without taps, all of them are the matrix SVD."""
    return decomposition(name).wiring(shape.taps) if shape.taps else MATRIX


def family_of(name: str, shape: LayerShape, ranks: Sequence[int]) -> str | None:
    """The family of a decomposition's ranks that have to be fitted; None where the closed form is all there is."""
    return decomposition(name).family(ranks) if shape.taps else None


def expand(name: str, weight: Tensor, shape: LayerShape, moment: Moment = IDENTITY) -> Expansion:
    """The closed-form expansion of a weight (g, o, i, *taps) of any floating dtype, computed in float64.

    That of a matrix is in the metric of `moment`, that of all others in the product of its parts along the axes
    (`whitening`).
    """
    wiring = wiring_of(name, shape)
    if moment is not IDENTITY and is_matrix(wiring):
        return WeightedExpansion(weight, wiring, moment)
    method = decomposition(name) if shape.taps else SVD
    whitening = None if moment is IDENTITY else Whitening.of(moment, weight)
    if whitening is None:
        return method.expand(weight.double(), wiring, weight.dtype == torch.float64)
    white = whitening.whitened(weight)
    return WhitenedExpansion(white, method.expand(white, wiring, False), whitening)


def fit(
    name: str,
    weight: Tensor,
    shape: LayerShape,
    ranks: Sequence[int],
    *,
    layer: str = "layer",
    sweeps: int | None = None,
    starts: int = 1,
    expansion: Expansion | None = None,
    moment: Moment = IDENTITY,
    steps: int | None = None,
) -> Factors:
    """Factors (float64) of a weight (g, o, i, *taps) at `ranks`: the closed form, then alternating least squares.

    With the `moment` of what goes into the layer all this is done in coordinates half-way to those of the metric
    (`whitening`); then what holds the outputs is solved for in the metric itself, and all factors are refined there, by
    so many `steps` at most (more on small weights, unless given).

    `sweeps` overrides the decomposition's own. With more than one of `starts` the others are random, from fixed seeds,
    and the best outcome counts: where a weight has a small exact rank, alternating least squares from the closed form
    may stop short of it. Starts end early once four of them reached the least error. `expansion` saves the work of
    expanding the weight again. Raises PlanError for ranks that are not positive, not one per bond, or larger than of
    any use.
    """
    wiring = wiring_of(name, shape)
    _check_ranks(name, wiring, shape, ranks, layer)
    if not weight.any():
        return _of_zero(wiring, shape, ranks, weight.double())
    if moment is not IDENTITY and is_matrix(wiring):
        return balance(wiring, WeightedExpansion(weight, wiring, moment).factors(ranks))
    expansion = expansion or expand(name, weight, shape, moment)
    rounds = sweeps if sweeps is not None else decomposition(name).sweeps if family_of(name, shape, ranks) else 0
    factors = _begun(weight, expansion, shape, ranks, rounds, starts)
    if moment is not IDENTITY:
        whitening = expansion.whitening if isinstance(expansion, WhitenedExpansion) else None
        factors = refine(weight.double(), wiring, factors, moment, steps=steps, whitening=whitening)
    return balance(wiring, factors)


def fitted_error(
    weight: Tensor,
    shape: LayerShape,
    ranks: Sequence[int],
    *,
    sweeps: int,
    expansion: Expansion,
    moment: Moment,
    energy: float,
) -> float:
    """About the `metric_error` that `fit` reaches from an expansion of a weight after so many `sweeps`, without steps.

    `energy` is `energy_of` the weight.
    """
    factors = _begun(weight, expansion, shape, ranks, sweeps, 1, WORK_TO_MEASURE)
    if moment is IDENTITY:
        return metric_error(weight, expansion.wiring, factors, moment, energy=energy)
    return reached_error(weight, expansion.wiring, factors, moment, energy)


def _begun(
    weight: Tensor,
    expansion: Expansion,
    shape: LayerShape,
    ranks: Sequence[int],
    rounds: int,
    starts: int,
    work: int = WORK,
) -> Factors:
    """The best factors after alternating least squares from so many starts, in the expansion's own Frobenius norm."""
    white = expansion if isinstance(expansion, WhitenedExpansion) else None
    weight, inner = (white.weight, white.inner) if white else (weight.double(), expansion)
    wiring = expansion.wiring
    factors = alternate(weight, wiring, inner.factors(ranks), sweeps=rounds, work=work)
    reached = [relative_error(weight, wiring, factors)] if starts > 1 else []
    for seed in range(1, starts if rounds else 1):
        start = _random(wiring, shape, ranks, weight, seed)
        found = alternate(weight, wiring, start, sweeps=_PATIENCE * rounds, tolerance=1e-4)
        error = relative_error(weight, wiring, found)
        if error < min(reached):
            factors = found
        reached.append(error)
        if sum(one <= min(reached) * (1 + _AGREEMENT) for one in reached) == 4:
            break
    return white.whitening.unwhitened(wiring, factors) if white else factors


def _of_zero(wiring: Wiring, shape: LayerShape, ranks: Sequence[int], weight: Tensor) -> Factors:
    """Factors of a weight of zeros: the last one is zero, the others are not, so that gradients reach it."""
    *others, last = _random(wiring, shape, ranks, weight, 0)
    return (*(factor / factor.square().mean().sqrt() / factor[0].numel() ** 0.25 for factor in others), 0 * last)


def _random(wiring: Wiring, shape: LayerShape, ranks: Sequence[int], weight: Tensor, seed: int) -> Factors:
    """Standard normal factors from a seed."""
    generator = torch.Generator().manual_seed(seed)
    sizes = cast(dict[str, int], wiring.sizes(shape, list(ranks)))
    shapes = [(shape.groups, *wiring.factor_shape(position, sizes)) for position in range(len(wiring.factors))]
    return tuple(torch.randn(size, generator=generator, dtype=weight.dtype).to(weight.device) for size in shapes)


def _check_ranks(name: str, wiring: Wiring, shape: LayerShape, ranks: Sequence[int], layer: str) -> None:
    if len(ranks) != len(wiring.bonds):
        bonds = ", ".join(wiring.bonds)
        raise PlanError(f"{layer}: {name} takes {len(wiring.bonds)} ranks here (bonds {bonds}), not {len(ranks)}")
    for bond, rank, largest in zip(wiring.bonds, ranks, wiring.largest_ranks(shape, ranks), strict=True):
        if not 1 <= rank <= largest:
            weight = (shape.outputs, shape.inputs, *shape.kernel)
            raise PlanError(
                f"{layer}: {name} rank {rank} on bond {bond} is not in 1…{largest}, the useful ones for weight "
                f"{weight}; change it, or leave it out to have it searched"
            )
