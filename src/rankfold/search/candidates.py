"""Candidates: every form a layer can take, pruned to those that can be part of an optimal plan.

A candidate is dropped when another of the same layer is no worse in the error and in every cost of the stated units. In
any plan that uses it, the other one can stand in its place, so nothing better is lost. What the grids leave out before
that is said where they are made (`Train.grid`, `RingExpansion.grids`).
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from torch import Tensor

from rankfold.budget import LATENCY, RESOURCES, UNITS, Cost
from rankfold.decompositions import (
    DECOMPOSITIONS,
    Expansion,
    Grid,
    energy_of,
    expand,
    family_of,
    fitted_error,
    wiring_of,
)
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.decompositions.weighted import WeightedExpansion
from rankfold.decompositions.wiring import LayerShape
from rankfold.plan import LayerSpec
from rankfold.search.curves import Curve, Fit, FloatArray, IntArray, family_in, ratios

BALANCE = 1 / 16
"""How far apart the shares of inputs and outputs kept by a balanced decomposition may be.

Unbalanced ranks of Tucker reach a slightly lower error and a much lower accuracy: see benchmarks/tucker_choices.py.
"""

METRIC_KNOTS = 4
"""Candidates of a decomposition that are fitted, where errors are in a metric, before any search."""
BEATEN = 1.5
"""How many times the error that another decomposition has at no more of any cost makes a candidate no rival of it."""


@dataclass(frozen=True)
class _Candidates:
    """Candidates of one decomposition, before methods are merged."""

    name: str
    ranks: IntArray
    errors: FloatArray
    closed: FloatArray
    costs: dict[str, IntArray]
    fits: tuple[Fit, ...] = ()


def measure_layer(
    layer: LayerSpec,
    weight: Float[Tensor, "g o i *taps"],
    names: Sequence[str],
    *,
    units: Sequence[str] = UNITS,
    moments: Mapping[str, Moment] | None = None,
    align: int = 1,
) -> Curve:
    """The candidates of a layer among the decompositions `names`, none of them larger than the layer in any of `units`.

    Ranks are multiples of `align`, but where the largest are below four times of it.

    Errors are squared relative Frobenius errors of the closed form; where that is far from the best (`knots`), of the
    form fitted at a few candidates and interpolated between them: at the smaller half of these first, then at the
    larger where no other decomposition is far better (`BEATEN`). With an entry of the layer's in `moments` all errors
    are in its metric, and all decompositions are fitted so.
    """
    moments = moments or {}
    moment, known = moments.get(layer.name, IDENTITY), layer.name in moments
    parts: list[tuple[_Candidates, Expansion]] = []
    seen = set()
    expansion: Expansion | None = None
    for name in names:
        wiring = wiring_of(name, layer.shape)
        if wiring in seen:  # on a layer with few taps several decompositions are the same
            continue
        seen.add(wiring)
        expansion = expand(name, weight, layer.shape, moment)
        parts += [(_candidates(name, layer, grid, units, align), expansion) for grid in expansion.grids()]
    exact = expansion if isinstance(expansion, WeightedExpansion) and not layer.shape.taps else None
    fitted = _raced(parts, units, _Fitting(weight, layer.shape, moment))
    return replace(_merged(layer, tuple(names), fitted, units, known), weight=weight, moments=moments, exact=exact)


def at_rank_one(layer: LayerSpec, name: str) -> Cost:
    """What a layer costs at least in a decomposition, but for time."""
    wiring = wiring_of(name, layer.shape)
    ones = [1] * len(wiring.bonds)
    params = int(wiring.params(layer.shape, ones))
    return Cost(params, int(wiring.macs(layer.shape, ones)), params * layer.itemsize)


def smallest_form(layer: LayerSpec, name: str) -> str:
    """How small a decomposition can make a layer at best, in words: for saying why it was skipped."""
    one, dense = at_rank_one(layer, name), layer.dense
    return f"{name} at rank 1 has {one.params:,} parameters of {dense.params:,} and {one.macs:,} MACs of {dense.macs:,}"


def pareto(errors: FloatArray, costs: Sequence[IntArray]) -> IntArray:
    """Indices of the candidates that no other one matches in the error and all costs, by rising cost.

    Of exact ties the first stays. One cost takes a sort; with two, a sweep over a staircase of (second cost, error);
    with more, each is compared with those that stay.
    """
    costs = _independent(costs)
    order = np.lexsort((errors, *reversed(costs)))
    if len(costs) == 1:
        best = np.minimum.accumulate(errors[order])
        return order[np.append(True, best[1:] < best[:-1])] if len(order) else order
    if len(costs) > 2:
        return _undominated(order, np.stack([errors, *costs[1:]], 1).astype(np.float64))
    kept = []
    stairs_cost: list[float] = []  # rising, while stairs_error falls
    stairs_error: list[float] = []
    for index in order:
        cost, error = costs[1][index], errors[index]
        at = bisect.bisect_right(stairs_cost, cost)
        if at and stairs_error[at - 1] <= error:
            continue
        kept.append(index)
        end = at
        while end < len(stairs_cost) and stairs_error[end] >= error:
            end += 1
        start = at - 1 if at and stairs_cost[at - 1] == cost else at
        stairs_cost[start:end] = [cost]
        stairs_error[start:end] = [error]
    return np.array(kept, dtype=np.int64)


def _undominated(order: IntArray, amounts: FloatArray) -> IntArray:
    """Those, in an order of rising first cost, that no earlier one matches in all other amounts."""
    kept = np.empty(len(order), dtype=np.int64)
    staying = np.empty((len(order), amounts.shape[1]))
    count = 0
    for index in order:
        if not (staying[:count] <= amounts[index]).all(1).any():
            kept[count], staying[count] = index, amounts[index]
            count += 1
    return kept[:count]


def _independent(costs: Sequence[IntArray]) -> list[IntArray]:
    """The costs without those that are a multiple of an earlier one, as bytes are of parameters."""
    kept: list[IntArray] = []
    for cost in costs:
        if not any(np.array_equal(cost * one[:1], one * cost[:1]) for one in kept):
            kept.append(cost)
    return kept


def _candidates(name: str, layer: LayerSpec, grid: Grid, units: Sequence[str], align: int) -> _Candidates:
    """The useful candidates of a grid that are not larger than the layer in any unit, and smaller in one."""
    wiring = wiring_of(name, layer.shape)
    ranks = [axis.ravel() for axis in np.meshgrid(*grid.ranks, indexing="ij")]
    errors = grid.errors.ravel()
    params = np.broadcast_to(wiring.params(layer.shape, ranks), errors.shape)
    macs = np.broadcast_to(wiring.macs(layer.shape, ranks), errors.shape)
    costs = {"params": params, "macs": macs, "bytes": params * layer.itemsize}
    fits = np.isfinite(errors) & _balanced(name, layer, ranks)
    smaller = np.zeros_like(fits)
    for rank, largest in zip(ranks, wiring.largest_ranks(layer.shape, ranks), strict=True):
        fits &= (rank <= largest) & ((rank % align == 0) | (rank.max() < 4 * align))
    if LATENCY in units:  # what has more of everything is not worth a measurement
        fits &= (params <= layer.dense.params) & (macs <= layer.dense.macs)
    chosen = np.flatnonzero(fits)
    costs[LATENCY] = np.zeros_like(params)
    if LATENCY in units and layer.times:
        costs[LATENCY][chosen] = layer.times(layer.shape, wiring, [rank[chosen] for rank in ranks])
    for unit in units:
        fits &= costs[unit] <= getattr(layer.dense, unit)
        smaller |= costs[unit] < getattr(layer.dense, unit)
    chosen = np.flatnonzero(fits & smaller)
    front = chosen[pareto(errors[chosen], [costs[unit][chosen] for unit in units])]
    kept = {unit: cost[front] for unit, cost in costs.items()}
    return _Candidates(name, np.stack(ranks, 1)[front], errors[front], errors[front], kept)


def _merged(
    layer: LayerSpec, tried: tuple[str, ...], parts: Sequence[_Candidates], units: Sequence[str], metric: bool
) -> Curve:
    """All parts and the dense layer as one curve, pruned together; errors are in a `metric` or those of the weight."""
    dense = layer.dense
    methods: list[str | None] = [None, *(part.name for part in parts for _ in part.errors)]
    ranks = [(), *(tuple(map(int, row)) for part in parts for row in part.ranks)]
    errors = np.concatenate([[0.0], *(part.errors for part in parts)])
    closed = np.concatenate([[0.0], *(part.closed for part in parts)])
    costs = {
        unit: np.concatenate([[getattr(dense, unit)], *(part.costs[unit] for part in parts)]).astype(np.int64)
        for unit in RESOURCES
    }
    known = [not (part.fits and DECOMPOSITIONS[part.name].optimistic) for part in parts for _ in part.errors]
    trusted = np.flatnonzero([True, *known])
    front = trusted[pareto(errors[trusted], [costs[unit][trusted] for unit in units])]
    front = np.union1d(front, _rivals(parts, trusted, errors, [costs[unit] for unit in units]))
    front = front[np.argsort(-costs[units[0]][front], kind="stable")]
    front = np.append(0, front[front != 0])
    return Curve(
        layer,
        tried,
        tuple(methods[k] for k in front),
        tuple(ranks[k] for k in front),
        errors[front],
        {unit: cost[front] for unit, cost in costs.items()},
        closed[front],
        {cast(str, family_in(p.name, layer.shape, p.fits[0].ranks, metric)): p.fits for p in parts if p.fits},
    )


def _rivals(parts: Sequence[_Candidates], trusted: IntArray, errors: FloatArray, costs: Sequence[IntArray]) -> IntArray:
    """The candidates of families that none of the `trusted` ones matches, but for those of their own family.

    Within a family errors are interpolated, so none is dropped; errors that are bounds from below drop no other.
    """
    kept = [np.empty(0, dtype=np.int64)]
    start = 1
    for part in parts:
        own = np.arange(start, start + len(part.errors))
        start += len(part.errors)
        if not part.fits or len(own) == 0:
            continue
        others = np.setdiff1d(trusted, own)
        matched = errors[others][None] <= errors[own][:, None]
        for cost in costs:
            matched &= cost[others][None] <= cost[own][:, None]
        kept.append(own[~matched.any(1)])
    return np.concatenate(kept)


def _balanced(name: str, layer: LayerSpec, ranks: Sequence[IntArray]) -> npt.NDArray[np.bool_]:
    """Which candidates keep like shares of inputs and outputs, to within `BALANCE` or one component."""
    if not DECOMPOSITIONS[name].balanced or len(ranks) < 2:
        return np.ones(len(ranks[0]), dtype=np.bool_)
    wiring = wiring_of(name, layer.shape)
    sizes = dict(zip(wiring.bonds, ranks, strict=True))
    opened = np.prod([sizes[bond] for bond in wiring.stages[0].opened], axis=0)
    summed = np.prod([sizes[bond] for bond in wiring.stages[-1].summed], axis=0)
    inputs, outputs = layer.shape.inputs, layer.shape.outputs
    slack = max(BALANCE, 1 / min(inputs, outputs))
    return np.asarray(np.abs(opened / inputs - summed / outputs) <= slack + 1e-12)


@dataclass(frozen=True)
class _Fitting:
    """Fits of a layer's candidates, by which their errors are scaled where they are of a family."""

    weight: Tensor
    shape: LayerShape
    moment: Moment

    @cached_property
    def energy(self) -> float:
        """E‖W x‖²."""
        return energy_of(self.weight.double(), self.moment)

    def knots(self, candidates: _Candidates) -> IntArray:
        """The places to fit at, from a sixteenth to three quarters of the largest; none without a family."""
        name, known = candidates.name, self.moment is not IDENTITY
        if not len(candidates.errors) or family_in(name, self.shape, candidates.ranks[0].tolist(), known) is None:
            return np.empty(0, dtype=np.int64)
        size = np.log(candidates.costs["params"])
        count = METRIC_KNOTS if known else DECOMPOSITIONS[name].knots
        targets = size.max() + np.log(np.geomspace(1 / 16, 3 / 4, count))
        return np.unique([int(np.abs(size - target).argmin()) for target in targets])

    def fitted(self, candidates: _Candidates, expansion: Expansion, knots: IntArray) -> _Candidates:
        """The candidates once those at some places are fitted too; between fits it is interpolated over log params."""
        if not len(knots):
            return candidates
        params, fits = candidates.costs["params"], list(candidates.fits)
        for knot in knots:
            ranks = tuple(int(rank) for rank in candidates.ranks[knot])
            alternates = family_of(candidates.name, self.shape, ranks) is not None
            sweeps = DECOMPOSITIONS[candidates.name].sweeps // 3 if alternates else 0
            reached = fitted_error(
                self.weight,
                self.shape,
                ranks,
                sweeps=sweeps,
                expansion=expansion,
                moment=self.moment,
                energy=self.energy,
            )
            fits.append(Fit(ranks, int(params[knot]), float(reached / max(candidates.closed[knot], 1e-300))))
        return replace(candidates, errors=candidates.closed * ratios(params, fits), fits=tuple(fits))


def _raced(
    parts: Sequence[tuple[_Candidates, Expansion]], units: Sequence[str], fitting: _Fitting
) -> list[_Candidates]:
    """The candidates with their errors as fits have them: at the smaller half of the knots, and where it may matter."""
    knots = [fitting.knots(candidates) for candidates, _ in parts]
    first = [fitting.fitted(*part, places[: len(places) // 2]) for part, places in zip(parts, knots, strict=True)]
    trusted = [one for one in first if not (one.fits and DECOMPOSITIONS[one.name].optimistic)]
    found = []
    for one, (_, expansion), places in zip(first, parts, knots, strict=True):
        others, larger = [other for other in trusted if other is not one], places[len(places) // 2 :]
        rivals = [not _beaten(one, place, others, units) for place in larger.tolist()]
        found.append(fitting.fitted(one, expansion, larger[np.array(rivals, dtype=np.bool_)]))
    return found


def _beaten(one: _Candidates, place: int, others: Sequence[_Candidates], units: Sequence[str]) -> bool:
    """Whether a candidate of others costs no more than one at a place, in any unit, and has far less of an error."""
    for other in others:
        beating = other.errors * BEATEN <= one.errors[place]
        for unit in units:
            beating &= other.costs[unit] <= one.costs[unit][place]
        if beating.any():
            return True
    return False
