"""Simple searches to compare with: one level for every layer, or one layer after the other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rankfold.errors import BudgetError
from rankfold.progress import Progress, silent
from rankfold.search.curves import FloatArray
from rankfold.search.problem import ERROR, Problem, Selection, check_feasible

_STEPS = 60


def uniform(problem: Problem, progress: Progress = silent, /) -> Selection:
    """Every layer keeps the same fraction of its cost, the largest that meets the limits.

    A layer takes its candidate of least error among those within the fraction, in every unit that matters; where none
    is so small, its cheapest. Where the error is limited, the fraction is the smallest that meets that.
    """
    units = tuple(problem.limits) or (problem.minimise,)

    def choose(fraction: float) -> tuple[int, ...]:
        choices = []
        for curve in problem.curves:
            shares = np.max([curve.costs[unit] / max(int(curve.costs[unit][0]), 1) for unit in units], axis=0)
            within = np.flatnonzero(shares <= fraction)
            choices.append(int(within[curve.errors[within].argmin()]) if len(within) else int(shares.argmin()))
        return tuple(choices)

    return at_best_level(problem, choose, "uniform")


def energy(problem: Problem, progress: Progress = silent, /) -> Selection:
    """Every layer keeps the same share of its energy, the largest that meets the limits.

    A layer takes its cheapest candidate whose squared relative error is within the threshold.
    """

    def choose(kept: float) -> tuple[int, ...]:
        choices = []
        for curve in problem.curves:
            within = np.flatnonzero(curve.errors <= 1 - kept)
            choices.append(int(within[problem.pressure(curve)[within].argmin()]))
        return tuple(choices)

    return at_best_level(problem, choose, "energy")


def greedy(problem: Problem, progress: Progress = silent, /) -> Selection:
    """From the dense network on, always the move of one layer that adds least error for what it saves.

    Once the limits hold, moves back that still fit are made, the most error for the least cost first. Where the error
    is limited, moves go on as long as it allows one.
    """
    check_feasible(problem)
    choices = [0] * len(problem.curves)
    pressures = [problem.pressure(curve) for curve in problem.curves]
    down = problem.minimise != ERROR
    while down or not problem.fits(choices):
        move = _best_move(problem, choices, pressures, down=down)
        if move is None:
            break
        choices[move[0]] = move[1]
    if not problem.fits(choices):
        raise BudgetError("search 'greedy' finds no plan for these limits together; search 'exact' does")
    while not down and (move := _best_return(problem, choices, pressures)):
        choices[move[0]] = move[1]
    return Selection(tuple(choices), problem.objective(choices))


def at_best_level(problem: Problem, choose: Callable[[float], tuple[int, ...]], name: str) -> Selection:
    """The choices at the best level in [0, 1], by bisection; more error and less cost belong to a lower level.

    That is the largest level at which the limits hold; where the error is limited, the smallest at which that does.
    """
    check_feasible(problem)
    down = problem.minimise != ERROR
    within = (lambda c: problem.used(c, ERROR) <= problem.error) if down else problem.fits
    low, high = (1.0, 0.0) if down else (0.0, 1.0)  # `low` holds, `high` is wanted
    if within(choose(high)):
        low = high
    elif not within(choose(low)):
        raise BudgetError(f"search {name!r} finds no plan for these limits together; search 'exact' does")
    for _ in range(_STEPS if low != high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if within(choose(middle)) else (low, middle)
    choices = choose(low)
    if not problem.fits(choices):
        raise BudgetError(f"search {name!r} finds no plan for these limits together; search 'exact' does")
    return Selection(choices, problem.objective(choices))


def _best_move(
    problem: Problem, choices: list[int], pressures: list[FloatArray], *, down: bool
) -> tuple[int, int] | None:
    """The layer and candidate that add least error per pressure removed; within the error's limit if `down`."""
    left = problem.error - problem.used(choices, ERROR)
    best, found = np.inf, None
    for layer, (curve, pressure) in enumerate(zip(problem.curves, pressures, strict=True)):
        saved = pressure[choices[layer]] - pressure
        added = curve.errors - curve.errors[choices[layer]]
        allowed = (saved > 1e-15) & ((added < left) | (not down))
        if allowed.any():
            rates = np.where(allowed, added / np.where(allowed, saved, 1.0), np.inf)
            k = int(rates.argmin())
            if rates[k] < best:
                best, found = float(rates[k]), (layer, k)
    return found


def _best_return(problem: Problem, choices: list[int], pressures: list[FloatArray]) -> tuple[int, int] | None:
    """The layer and candidate that take most error away per pressure added, within the limits."""
    best, found = 0.0, None
    left = {unit: problem.room(unit) - problem.used(choices, unit) for unit in problem.limits}
    for layer, (curve, pressure) in enumerate(zip(problem.curves, pressures, strict=True)):
        now = choices[layer]
        fits = np.all([curve.costs[unit] - curve.costs[unit][now] <= room for unit, room in left.items()], axis=0)
        gained = np.where(fits, curve.errors[now] - curve.errors, 0.0)
        rates = gained / np.maximum(pressure - pressure[now], 1e-12)
        k = int(rates.argmax())
        if rates[k] > best:
            best, found = float(rates[k]), (layer, k)
    return found
