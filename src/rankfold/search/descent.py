"""Descent on an objective of the whole network, one plan to the next, within the budget.

Sequential linear programming with a proximal term. At a plan with weights Ŵ the loss is L, its derivative G. A
candidate j of layer i is priced ⟨G_i, Ŵ_j − Ŵ_i⟩ + c ‖Ŵ_j − Ŵ_i‖² / ‖W_i‖²: the derivative of L by the candidate's
probability in the blended network, and what a change of that size costs besides, for which c stands. The relaxation at
these prices, cooled and rounded, is a plan; several c are tried, and the best plan is taken if L itself is lower there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from torch import Tensor

from rankfold.errors import SearchError
from rankfold.search.curves import Curve, FloatArray, IntArray, subset
from rankfold.search.objective import Objective, inner
from rankfold.search.problem import Problem
from rankfold.search.relaxation import Relaxed, cooled
from rankfold.search.rounding import rounded
from rankfold.search.weights import Reconstructions

SPACINGS = (0.1, 0.05, 0.025)
"""Distances between neighbouring candidates, as shares of the layer's cost; after a turn in vain comes the next."""
REACH = 4
"""Candidates on either side of the present one."""
TRIALS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Proximal weights tried in a turn, as multiples of the one that did best last."""
COLD = 1e-3
"""Temperature of the relaxation, as a share of the mean range of prices within a layer."""


@dataclass(frozen=True)
class Point:
    """Where a descent is: the plan, turns taken, how many of the last were in vain, which spacing, proximal weight.

    A proximal weight of zero stands for the first, which is the loss over the sum of the errors.
    """

    choices: tuple[int, ...]
    turn: int = 0
    vain: int = 0
    spacing: int = 0
    proximity: float = 0.0


@dataclass(frozen=True)
class Turn:
    """One turn of a descent: the loss before it, the candidates it had, their last distribution, and where it led."""

    point: Point
    loss: float
    window: Problem
    relaxed: Relaxed


def descended(problem: Problem, objective: Objective, point: Point, turns: int) -> Iterator[Turn]:
    """Turns from `point` on, until every spacing was in vain, or `turns` are over.

    Raises SearchError where the loss or its derivative is not finite.
    """
    weights = Reconstructions()
    while point.turn < turns and point.vain < len(SPACINGS):
        now = [weights.weight(curve, k) for curve, k in zip(problem.curves, point.choices, strict=True)]
        loss, slopes = objective.gradient(problem.curves, now, point.turn)
        _check(loss, slopes, problem, objective)
        places = [
            _window(curve, problem.pressure(curve), k, SPACINGS[point.spacing])
            for curve, k in zip(problem.curves, point.choices, strict=True)
        ]
        window = replace(
            problem, curves=tuple(subset(curve, part) for curve, part in zip(problem.curves, places, strict=True))
        )
        slope, distance = _prices(weights, problem, places, now, slopes)
        proximity = point.proximity or loss / max(problem.objective(point.choices), 1e-9)
        best, best_loss, best_proximity = point.choices, loss, proximity
        seen = {point.choices}
        for trial in TRIALS:
            prices = [s + trial * proximity * d for s, d in zip(slope, distance, strict=True)]
            relaxed = cooled(window, prices, COLD)
            found = rounded(window, relaxed.reduced, values=prices)
            choices = tuple(int(part[k]) for part, k in zip(places, found or (), strict=False))
            if found is None or choices in seen:
                continue
            seen.add(choices)
            there = [weights.weight(curve, k) for curve, k in zip(problem.curves, choices, strict=True)]
            value = objective.loss(problem.curves, there, point.turn)
            if value < best_loss:
                best, best_loss, best_proximity = choices, value, trial * proximity
        if best == point.choices:
            spacing = (point.spacing + 1) % len(SPACINGS)
            point = Point(best, point.turn + 1, point.vain + 1, spacing, proximity)
        else:
            point = Point(best, point.turn + 1, 0, point.spacing, best_proximity)
        yield Turn(point, loss, window, relaxed)


def _prices(
    weights: Reconstructions,
    problem: Problem,
    places: Sequence[IntArray],
    now: Sequence[Tensor],
    slopes: Sequence[Tensor],
) -> tuple[list[FloatArray], list[FloatArray]]:
    """For every candidate of every window the change of the loss to first order, and its relative squared distance."""
    slope, distance = [], []
    for curve, part, weight, derivative in zip(problem.curves, places, now, slopes, strict=True):
        moves = [weights.weight(curve, int(k)) - weight for k in part]
        size = max(float(cast(Tensor, curve.weight).double().square().sum()), 1e-300)
        slope.append(np.array([inner(derivative, move) for move in moves]))
        distance.append(np.array([float(move.double().square().sum()) / size for move in moves]))
    return slope, distance


def _window(curve: Curve, cost: FloatArray, chosen: int, spacing: float) -> IntArray:
    """The chosen candidate and the best ones at costs around its own, `spacing` of the layer's cost apart."""
    places = {chosen}
    for step in range(-REACH, REACH + 1):
        within = np.flatnonzero(cost <= cost[chosen] + step * spacing * cost[0] + 1e-12)
        if step and len(within):
            places.add(int(within[curve.errors[within].argmin()]))
    return np.array(sorted(places))


def _check(loss: float, slopes: Sequence[Tensor], problem: Problem, objective: Objective) -> None:
    bad = [c.layer.name for c, slope in zip(problem.curves, slopes, strict=True) if not slope.isfinite().all()]
    if bad or not math.isfinite(loss):
        where = f"its derivative by {bad[0]}'s weight" if bad and math.isfinite(loss) else f"it is {loss}"
        raise SearchError(
            f"the objective is not finite ({where}): {objective.describe()}; check its inputs, use a wider dtype, or "
            "leave the layer out with exclude"
        )
