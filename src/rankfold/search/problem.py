"""What every search is given and gives back: one candidate per layer, one thing least, the others within limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import scipy.optimize
import scipy.sparse

from rankfold.budget import Cost, describe
from rankfold.errors import BudgetError
from rankfold.progress import Progress, silent
from rankfold.search.curves import Curve, FloatArray
from rankfold.search.trace import Trace

ERROR = "error"
"""The name of the squared relative error where it stands beside the units of cost."""
STARTS = 8
"""Starts of a fit, at most, where the error is limited; benchmarks/planted_rank.py says what they find."""


@dataclass(frozen=True)
class Problem:
    """Choose one candidate of each curve so that `minimise` is least and no limit is exceeded.

    `limits` are those on the cost of the whole network, by unit; `error` is that on the sum of the curves' errors;
    `fixed` is what everything outside the curves costs; `original` what the network costs now. What is minimised is
    the error, or a unit of cost. Errors count by their prices.
    """

    curves: tuple[Curve, ...]
    limits: dict[str, int]
    fixed: Cost
    original: Cost
    error: float = math.inf
    minimise: str = ERROR

    @property
    def starts(self) -> int:
        """From how many starts a candidate is fitted: from more where the error it reaches is what is limited."""
        return STARTS if math.isfinite(self.error) else 1

    @property
    def limited(self) -> tuple[str, ...]:
        """What is limited: units of cost, and the error last."""
        return (*self.limits, *([ERROR] if math.isfinite(self.error) else []))

    def amounts(self, curve: Curve, what: str) -> FloatArray:
        """What each candidate of a curve uses of something limited or minimised."""
        return curve.errors if what == ERROR else curve.costs[what].astype(np.float64)

    def values(self, curve: Curve) -> FloatArray:
        """What each candidate adds to the objective: its error, or its cost as a share of the network's."""
        if self.minimise == ERROR:
            return curve.price.of(curve.errors)
        return self.amounts(curve, self.minimise) / max(getattr(self.original, self.minimise), 1)

    def room(self, what: str) -> int | float:
        """What the curves' layers may use together."""
        return self.error if what == ERROR else self.limits[what] - int(getattr(self.fixed, what))

    def used(self, choices: Sequence[int], what: str) -> int | float:
        """What the curves' layers use together at these choices; costs are exact integers."""
        if what == ERROR:
            return math.fsum(curve.errors[k] for curve, k in zip(self.curves, choices, strict=True))
        return sum(int(curve.costs[what][k]) for curve, k in zip(self.curves, choices, strict=True))

    def fits(self, choices: Sequence[int]) -> bool:
        """Whether these choices keep every limit."""
        return all(self.used(choices, what) <= self.room(what) for what in self.limited)

    def objective(self, choices: Sequence[int]) -> float:
        """The sum of the values."""
        return math.fsum(self.values(curve)[k] for curve, k in zip(self.curves, choices, strict=True))

    def pressure(self, curve: Curve) -> FloatArray:
        """Each candidate's cost as a share of the room, summed over the limited units; of the minimised one if none."""
        if not self.limits:
            return self.values(curve)
        return np.sum([curve.costs[unit] / max(self.room(unit), 1) for unit in self.limits], axis=0)


@dataclass(frozen=True)
class Selection:
    """The candidate chosen for each curve, its objective, and a proven lower bound on any (None: not computed).

    `curves` are those the choices are of, where the search measured more than it was given, and `trace` is its history
    if it keeps one.
    """

    choices: tuple[int, ...]
    objective: float
    bound: float | None = None
    curves: tuple[Curve, ...] | None = None
    trace: Trace | None = None


@runtime_checkable
class Search(Protocol):
    """A search: it raises BudgetError where it finds no plan within the limits."""

    def __call__(self, problem: Problem, progress: Progress = silent, /) -> Selection: ...


def check_feasible(problem: Problem) -> None:
    """Raises BudgetError, with the smallest feasible budget of the same proportions, where there is no plan at all."""
    smallest = {
        unit: int(getattr(problem.fixed, unit)) + sum(int(curve.costs[unit].min()) for curve in problem.curves)
        for unit in problem.limits
    }
    if len(problem.limited) > 1:
        scale = _smallest_scale(problem)
        if scale <= 1:
            return
        smallest = {
            unit: min(int(np.ceil(limit * scale)), int(getattr(problem.original, unit)))
            for unit, limit in problem.limits.items()
        }
    elif all(smallest[unit] <= limit for unit, limit in problem.limits.items()):
        return
    asked = describe(problem.limits, problem.original)
    within = f" with an error within {problem.error / len(problem.curves):.3g}" if ERROR in problem.limited else ""
    raise BudgetError(
        f"no plan meets the budget {asked}{within}: the smallest feasible one is "
        f"{describe(smallest, problem.original)}; raise it, include more layers, or allow more decompositions"
    )


def membership(curves: Sequence[Curve]) -> scipy.sparse.csr_array:
    """Matrix with a row per curve and a column per candidate: one where the candidate is the curve's."""
    rows = np.repeat(np.arange(len(curves)), [len(curve) for curve in curves])
    return scipy.sparse.csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))


def shares_of(problem: Problem, curves: Sequence[Curve]) -> FloatArray:
    """What all candidates of the curves, one after the other, use of each limited thing, as shares of its room."""
    return np.array(
        [
            np.concatenate([problem.amounts(curve, what) for curve in curves]) / max(problem.room(what), 1e-9)
            for what in problem.limited
        ]
    )


def _smallest_scale(problem: Problem) -> float:
    """The smallest factor on all cost limits at once at which a plan exists."""
    count = sum(len(curve) for curve in problem.curves)
    one_each = scipy.sparse.hstack([membership(problem.curves), scipy.sparse.csr_array((len(problem.curves), 1))])
    rows, most = [], []
    for unit, limit in problem.limits.items():  # Σ cost/limit + fixed/limit <= scale
        rows.append(np.append(np.concatenate([curve.costs[unit] for curve in problem.curves]) / limit, -1.0))
        most.append(-getattr(problem.fixed, unit) / limit)
    if ERROR in problem.limited:
        rows.append(np.append(np.concatenate([curve.errors for curve in problem.curves]), 0.0))
        most.append(problem.error)
    result = scipy.optimize.milp(
        np.append(np.zeros(count), 1.0),
        constraints=[
            scipy.optimize.LinearConstraint(one_each.tocsr(), 1, 1),
            scipy.optimize.LinearConstraint(np.array(rows), -np.inf, most),
        ],
        integrality=np.append(np.ones(count), 0),
        bounds=scipy.optimize.Bounds(0, np.append(np.ones(count), np.inf)),
        options={"mip_rel_gap": 1e-4, "time_limit": 20},
    )
    return float(result.fun)
