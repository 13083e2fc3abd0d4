"""Simple searches to compare with: the same fraction for every layer, or the same error for every layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rankfold.errors import BudgetError
from rankfold.search.problem import Problem, Selection, check_feasible

_STEPS = 60


def uniform(problem: Problem) -> Selection:
    """Every layer keeps the same fraction of its cost, the largest that meets the limits.

    A layer takes its candidate of least error among those within the fraction, in every limited unit; where none is
    so small, its cheapest.
    """

    def choose(fraction: float) -> tuple[int, ...]:
        choices = []
        for curve in problem.curves:
            shares = np.max([curve.costs[unit] / max(int(curve.costs[unit][0]), 1) for unit in problem.units], axis=0)
            within = np.flatnonzero(shares <= fraction)
            choices.append(int(within[curve.errors[within].argmin()]) if len(within) else int(shares.argmin()))
        return tuple(choices)

    return _largest(problem, choose, "uniform")


def energy(problem: Problem) -> Selection:
    """Every layer keeps the same share of its energy, the largest that meets the limits.

    A layer takes its cheapest candidate whose squared relative error is within the threshold.
    """

    def choose(kept: float) -> tuple[int, ...]:
        choices = []
        for curve in problem.curves:
            within = np.flatnonzero(curve.errors <= 1 - kept)
            choices.append(int(within[problem.pressure(curve)[within].argmin()]))
        return tuple(choices)

    return _largest(problem, choose, "energy")


def _largest(problem: Problem, choose: Callable[[float], tuple[int, ...]], name: str) -> Selection:
    """The choices at the largest level in [0, 1] that fits, by bisection."""
    check_feasible(problem)
    if problem.fits(choose(1.0)):
        return Selection(choose(1.0), problem.objective(choose(1.0)))
    low, high = 0.0, 1.0
    if not problem.fits(choose(low)):
        raise BudgetError(f"search {name!r} finds no plan for these limits together; search 'exact' does")
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.fits(choose(middle)) else (low, middle)
    choices = choose(low)
    return Selection(choices, problem.objective(choices))
