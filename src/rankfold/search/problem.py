"""What every search is given and gives back: one candidate per layer, total error least, costs within limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.sparse

from rankfold.budget import Cost, describe
from rankfold.curves import Curve, FloatArray, IntArray
from rankfold.errors import BudgetError


@dataclass(frozen=True)
class Problem:
    """Choose one candidate of each curve so that the sum of errors is least and no limit is exceeded.

    `limits` are those of the whole network by unit; `fixed` is what everything outside the curves costs; `original`
    what the network costs now.
    """

    curves: tuple[Curve, ...]
    limits: dict[str, int]
    fixed: Cost
    original: Cost

    @property
    def units(self) -> tuple[str, ...]:
        """The limited units."""
        return tuple(self.limits)

    def room(self, unit: str) -> int:
        """What the curves' layers may cost together."""
        return self.limits[unit] - int(getattr(self.fixed, unit))

    def used(self, choices: Sequence[int], unit: str) -> int:
        """What the curves' layers cost together at these choices."""
        return sum(int(curve.costs[unit][k]) for curve, k in zip(self.curves, choices, strict=True))

    def fits(self, choices: Sequence[int]) -> bool:
        """Whether these choices keep every limit, in exact integers."""
        return all(self.used(choices, unit) <= self.room(unit) for unit in self.units)

    def objective(self, choices: Sequence[int]) -> float:
        """The sum of the squared relative errors."""
        return float(sum(curve.errors[k] for curve, k in zip(self.curves, choices, strict=True)))

    def pressure(self, curve: Curve) -> FloatArray:
        """Each candidate's cost as a share of the room, summed over the units."""
        return np.sum([curve.costs[unit] / max(self.room(unit), 1) for unit in self.units], axis=0)


@dataclass(frozen=True)
class Selection:
    """The candidate chosen for each curve, its objective, and a proven lower bound on any (None: not computed)."""

    choices: tuple[int, ...]
    objective: float
    bound: float | None = None


Search = Callable[[Problem], Selection]
"""A search: it raises BudgetError where it finds no plan within the limits."""


def check_feasible(problem: Problem) -> None:
    """Raises BudgetError, with the smallest feasible budget of the same proportions, where there is no plan at all."""
    smallest = {
        unit: int(getattr(problem.fixed, unit)) + sum(int(curve.costs[unit].min()) for curve in problem.curves)
        for unit in problem.units
    }
    if len(smallest) > 1:
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
    raise BudgetError(
        f"no plan meets the budget {asked}: the smallest feasible one is {describe(smallest, problem.original)}; "
        "raise it, include more layers, or allow more decompositions"
    )


def membership(curves: Sequence[Curve]) -> scipy.sparse.csr_array:
    """Matrix with a row per curve and a column per candidate: one where the candidate is the curve's."""
    rows = np.repeat(np.arange(len(curves)), [len(curve) for curve in curves])
    return scipy.sparse.csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))


def costs_of(curves: Sequence[Curve], unit: str) -> IntArray:
    """Costs of all candidates of all curves, one after the other."""
    return np.concatenate([curve.costs[unit] for curve in curves])


def _smallest_scale(problem: Problem) -> float:
    """The smallest factor on all limits at once at which a plan exists."""
    count = sum(len(curve) for curve in problem.curves)
    one_each = scipy.sparse.hstack([membership(problem.curves), scipy.sparse.csr_array((len(problem.curves), 1))])
    rows = [
        np.append(costs_of(problem.curves, unit) / problem.limits[unit], -1.0) for unit in problem.units
    ]  # Σ cost/limit + fixed/limit <= scale
    fixed = [-getattr(problem.fixed, unit) / problem.limits[unit] for unit in problem.units]
    result = scipy.optimize.milp(
        np.append(np.zeros(count), 1.0),
        constraints=[
            scipy.optimize.LinearConstraint(one_each.tocsr(), 1, 1),
            scipy.optimize.LinearConstraint(np.array(rows), -np.inf, fixed),
        ],
        integrality=np.append(np.ones(count), 0),
        bounds=scipy.optimize.Bounds(0, np.append(np.ones(count), np.inf)),
        options={"mip_rel_gap": 1e-4, "time_limit": 20},
    )
    return float(result.fun)
