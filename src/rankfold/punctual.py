"""Plans that keep a limit on the time: timed whole, and sought again where the sum of their layers' times was off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rankfold.budget import LATENCY
from rankfold.errors import BudgetError
from rankfold.network.finding import Layers
from rankfold.network.rehearsal import rehearsed
from rankfold.network.timing.stages import remember
from rankfold.network.timing.turns import latency
from rankfold.planning import Found, Task, feasible_plan
from rankfold.progress import Progress, silent
from rankfold.search.curves import Curve, FloatArray
from rankfold.search.widths import Width

TURNS = 4
"""Plans that are sought and timed for a limit on the latency, at most."""
SECONDS = 8.0
"""How long a plan is timed, about."""
MOST = 300
"""Passes of it, at most: thirty of a few milliseconds each differ by some percent from the next thirty."""
CAUTION = 0.0125
"""Part of the limit that is left free in the first turn after one that missed it, in the second twice as much."""
NEAR = 0.97
"""Part of the limit from which on a measured latency is near enough to it."""


def punctual_plan(
    task: Task, layers: Layers, curves: Sequence[Curve], widths: Sequence[Width] = (), *, progress: Progress = silent
) -> Found:
    """As `feasible_plan`, and where latency is limited, one that was measured to keep the limit.

    Times of layers do not add up to a network's quite. So what a plan makes is timed beside the original before
    anything is fitted, and a plan is sought again for another sum, between those that are known to be too large and too
    small. The plan's settings hold what was predicted and measured in every turn; from the second on, what is predicted
    goes by what was measured of the plans before. Raises BudgetError where no plan was measured to keep the limit.
    """
    if LATENCY not in task.budget.given:
        return feasible_plan(task, layers, curves, widths, progress=progress)
    limit, asked = task.budget.limits(task.before)[LATENCY], task.budget
    relative = asked.is_fraction(LATENCY)
    turns: list[list[float]] = []
    seen = [(task.before.latency, task.before.latency)]
    best: Found | None = None
    for turn in range(TURNS):
        try:
            found = feasible_plan(replace(task, budget=asked), layers, curves, widths, progress=progress)
        except BudgetError:
            if not turns:
                raise
            break
        progress("timing the plan", turn, TURNS)
        before, after = latency(
            (task.model, rehearsed(task.model, found.plan)),
            task.inputs,
            rounds=MOST,
            seconds=SECONDS,
            compiled=task.compiled,
        )
        measured = round(after / before * task.before.latency if relative else 1e6 * after)
        turns.append([_through(*_rising(seen), found.plan.after.latency) / 1e6, measured / 1e6])
        seen.append((found.plan.after.latency, measured))
        timed = replace(found, plan=replace(found.plan, after=replace(found.plan.after, latency=measured)))
        if measured <= limit and (best is None or _loss(timed) < _loss(best)):
            best = timed
        if NEAR * limit <= measured <= limit or (measured <= limit and not found.plan.changed):
            break
        aimed = _through(*_rising(seen)[::-1], limit * (1 - CAUTION * (1 + turn)))
        asked = replace(asked, latency=f"{max(round(aimed), 1)}ns")
    progress("timing the plan", TURNS, TURNS)
    remember(layers.found)
    if best is None:
        fastest = min(turn[1] for turn in turns) / (task.before.latency / 1e6)
        raise BudgetError(
            f"no plan meets the budget latency={task.budget.latency}: the fastest that was measured takes "
            f"{fastest:.3f} of the original's time; raise it, include more layers, or allow more decompositions"
        )
    told = {"budget": dict(task.budget.given), "latency_turns_ms": [[round(one, 4) for one in turn] for turn in turns]}
    return replace(best, plan=replace(best.plan, settings={**best.plan.settings, **told}))


def _rising(seen: Sequence[tuple[float, float]]) -> tuple[FloatArray, FloatArray]:
    """Sums of layers' times, and what was measured of such plans, as it would be if larger sums never took less."""
    sums, measured = (np.array(one, float) for one in zip(*sorted(seen), strict=True))
    return sums, np.maximum.accumulate(measured)


def _through(places: FloatArray, values: FloatArray, at: float) -> float:
    """What is linear from one known place to the next, and in proportion to the place before and behind them all."""
    if places[0] <= at <= places[-1]:
        return float(np.interp(at, places, values))
    end = 0 if at < places[0] else -1
    return float(at * values[end] / max(places[end], 1.0))


def _loss(found: Found) -> float:
    """What a plan was chosen by."""
    return float(found.plan.settings["objective"])
