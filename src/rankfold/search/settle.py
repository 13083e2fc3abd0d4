"""Refinement around what a search chooses, until nothing it relies on is interpolated.

Where a candidate has to be fitted to know its error (CP), a curve starts with a few fits. Whatever a search chooses is
fitted next, the curve corrected and the search run again: fits gather around the ranks that matter, and candidates that
no search comes near are never fitted. So do the candidates of large units, which have only some of them at first.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from rankfold.decompositions import DECOMPOSITIONS
from rankfold.progress import Progress, silent
from rankfold.search.curves import Curve, Fit, FloatArray, refitted
from rankfold.search.evbmf import evbmf_ranks
from rankfold.search.problem import ERROR, Problem, Search, Selection
from rankfold.sharing import shared

GUESSES = 12
"""Refinements after which candidates that are only bounded from below, and were not tried so far, are given up."""
ROUNDS = 24
"""Refinements after which the search has to do with the candidates that are fitted."""
CLOSER = 8
"""Times that candidates are added around those that were chosen, at most."""


def settle(problem: Problem, search: Search, progress: Progress = silent) -> Selection:
    """What the search chooses once nothing it relies on is a guess.

    Where the error is limited, every chosen candidate is fitted, and the next cheaper one of its family as well, so
    that a layer is not left dearer than it must be because of an interpolated error. Otherwise interpolated errors are
    good enough, but those of candidates smaller than all that were fitted are not, nor optimistic ones. Units that have
    only some of their candidates get those around the chosen one, until that is chosen again.
    """
    strict, added = ERROR in problem.limited, 0
    for turn in range(ROUNDS):
        selection = search(problem, progress)
        problem = replace(problem, curves=selection.curves or problem.curves)
        wanted = unsettled(problem, selection.choices)
        if not strict:
            pairs = zip(problem.curves, selection.choices, wanted, strict=True)
            wanted = [places if curve.guessed(k) else [] for curve, k, places in pairs]
        left = sum(map(bool, wanted))
        if not left:
            nearer = tuple(curve.closer(k) for curve, k in zip(problem.curves, selection.choices, strict=True))
            if added == CLOSER or all(map(operator.is_, nearer, problem.curves)):
                break
            added += 1
            problem = replace(problem, curves=nearer)
            continue
        progress("fitting candidates", 0, left, f"refinement {turn + 1}")
        problem = visited(problem, wanted, progress)
        if turn + 1 == GUESSES:
            problem = grounded(problem)
    else:
        problem = known(problem)
        selection = search(problem, progress)
    return replace(selection, curves=problem.curves)


def grounded(problem: Problem) -> Problem:
    """The problem without candidates that are only bounded from below."""
    return replace(problem, curves=tuple(curve.grounded() for curve in problem.curves))


def known(problem: Problem) -> Problem:
    """The problem with the candidates alone whose errors are known."""
    return replace(problem, curves=tuple(curve.known() for curve in problem.curves))


def _hopeful(curve: Curve, chosen: int, cost: FloatArray, slack: float) -> list[int]:
    """The cheapest candidate that may still take the place of `chosen`: its bound from below says that it can."""
    cheaper = (cost < cost[chosen]) & (curve.closed <= curve.errors[chosen] + slack)
    able = [k for k in np.flatnonzero(cheaper) if curve.bounded(int(k))]
    return [int(min(able, key=lambda k: cost[k]))] if able else []


def visited(problem: Problem, wanted: Sequence[Sequence[int]], progress: Progress = silent) -> Problem:
    """The problem with the wanted candidates fitted."""
    curves = list(problem.curves)
    chosen = [number for number, places in enumerate(wanted) if places]

    def fitted(number: int) -> Curve:
        return curves[number].visited(wanted[number], starts=problem.starts)

    def dressed(number: int, fits: Sequence[Mapping[str, tuple[Fit, ...]]]) -> Curve:
        parts = zip(curves[number].parts, fits, strict=True)
        return curves[number].of_parts([refitted(part, own) for part, own in parts])

    made = shared(
        chosen,
        fitted,
        partial(progress, "fitting candidates"),
        packed=lambda curve: [part.fits for part in curve.parts],
        unpacked=dressed,
        device=next((one.weight.device for curve in curves for one in curve.parts if one.weight is not None), "cpu"),
    )
    for number, curve in zip(chosen, made, strict=True):
        curves[number] = curve
    return replace(problem, curves=tuple(curves))


def unsettled(problem: Problem, choices: Sequence[int]) -> list[list[int]]:
    """For each curve the candidates to fit before its choice can be relied on."""
    slack = max(problem.error - problem.used(choices, ERROR), 0.0) if ERROR in problem.limited else 0.0
    return [_unsettled(curve, k, problem, slack) for curve, k in zip(problem.curves, choices, strict=True)]


def _unsettled(curve: Curve, chosen: int, problem: Problem, slack: float) -> list[int]:
    """The candidates to fit before `chosen` can be relied on: itself, and what bounds it from below.

    That is, where the error is limited, the next cheaper candidate, and one halfway to the next cheaper fitted one. At
    first, ranks of a half, a quarter and so on are fitted as well, and the one that variational Bayes takes for signal:
    errors drop suddenly where a weight has a small exact rank, and fits of ranks far above it may stop short of it.
    """
    if curve.methods[chosen] is None:
        return []
    wanted = [] if curve.settled(chosen) else [chosen]
    if ERROR not in problem.limited or curve.weight is None:
        return wanted
    cost = problem.values(curve) if problem.minimise != ERROR else problem.pressure(curve)
    wanted += _hopeful(curve, chosen, cost, slack)
    family = curve.family(chosen)
    if family is None:
        return wanted
    order = [int(k) for k in np.argsort(cost, kind="stable") if curve.family(int(k)) == family]
    place = order.index(chosen)
    gap = next((step for step in range(1, place + 1) if curve.settled(order[place - step])), place + 1)
    below = {place - 1, place - gap // 2} if place and gap > 1 else set()
    if len(curve.fits.get(family, ())) <= DECOMPOSITIONS[str(curve.methods[chosen])].knots:
        below |= {place >> halvings for halvings in range(1, place.bit_length() + 1)}
        signal = evbmf_ranks(str(curve.methods[chosen]), curve.weight, curve.layer.shape)
        below |= {position for position in range(place) if curve.ranks[order[position]] == signal}
    return wanted + [order[position] for position in sorted(below) if not curve.settled(order[position])]
