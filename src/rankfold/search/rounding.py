"""From nearly a plan to a plan: repair what breaks a limit, then swap candidates while that helps.

A swap moves two layers at once, one of which may stay, to candidates of low price. Local search of this kind is what
closes the gap between a Lagrangian or linear relaxation and the multiple-choice knapsack (Kellerer, Pferschy and
Pisinger, Knapsack Problems, 2004, chapter 11).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankfold.search.curves import FloatArray, IntArray
from rankfold.search.problem import Problem

SWAPS = 64
"""Candidates per layer that a swap may take: those of least price."""
BESIDE = 16
"""And so many that cost a little more, and a little less, than the present one."""
MOST = 4096
"""Candidates of all layers together, about; pairs of them are looked at (134 MB), so large networks get fewer each."""


def rounded(
    problem: Problem, reduced: Sequence[FloatArray], *, values: Sequence[FloatArray] | None = None
) -> tuple[int, ...] | None:
    """One candidate per layer: that of least reduced price, repaired and improved by swaps; None if none was found."""
    likeliest = [int(price.argmin()) for price in reduced]
    cheapest = [int(problem.pressure(curve).argmin()) for curve in problem.curves]
    start = repaired(problem, likeliest, values=values) or repaired(problem, cheapest)
    return polished(problem, start, reduced, values=values) if start else None


def polished(
    problem: Problem,
    choices: Sequence[int],
    prices: Sequence[FloatArray],
    *,
    values: Sequence[FloatArray] | None = None,
) -> tuple[int, ...]:
    """The choices after every swap of one or two layers that lowers the sum of `values` and keeps the limits.

    A layer moves to one of its candidates of least price, or to one beside its present one. `values` are the problem's
    own unless given. The choices must keep the limits at the start.
    """
    values = values or [problem.values(curve) for curve in problem.curves]
    chosen = tuple(choices)
    share = min(1.0, MOST / (len(prices) * (SWAPS + 2 * BESIDE)))
    swaps, beside = max(2, int(SWAPS * share)), max(2, int(BESIDE * share))
    while True:
        near = [
            np.union1d(np.argsort(price, kind="stable")[:swaps], _beside(problem.pressure(curve), k, beside))
            for curve, price, k in zip(problem.curves, prices, chosen, strict=True)
        ]
        swapped = _swapped(problem, chosen, near, values)
        if swapped == chosen:
            return chosen
        chosen = swapped


def _beside(cost: FloatArray, k: int, count: int) -> IntArray:
    """So many candidates that cost a little more, and a little less, than the k-th."""
    order = np.argsort(cost, kind="stable")
    place = int(np.flatnonzero(order == k)[0])
    return order[max(place - count, 0) : place + count + 1]


def _swapped(
    problem: Problem, choices: Sequence[int], near: Sequence[IntArray], values: Sequence[FloatArray]
) -> tuple[int, ...]:
    """The choices after swaps among the candidates that are `near`, always the one that helps most."""
    chosen = list(choices)
    layers = np.repeat(np.arange(len(near)), [len(part) for part in near])
    places = np.concatenate(near)
    added = _at(values, near)
    used = {what: _at([problem.amounts(curve, what) for curve in problem.curves], near) for what in problem.limited}
    smallest = 1e-12 * max(sum(float(value[k]) for value, k in zip(values, chosen, strict=True)), 1e-9)
    while True:
        now = np.array([value[k] for value, k in zip(values, chosen, strict=True)])
        gains = now[layers] - added
        moves = (gains[:, None] + gains) * (layers[:, None] != layers)  # one layer cannot move twice
        moves += np.diag(gains)
        for what, amounts in used.items():
            held = np.array([problem.amounts(c, what)[k] for c, k in zip(problem.curves, chosen, strict=True)])
            more = amounts - held[layers]
            together = more[:, None] + more
            np.fill_diagonal(together, more)
            moves[together > problem.room(what) - problem.used(chosen, what)] = 0.0
        first, second = np.unravel_index(int(moves.argmax()), moves.shape)
        if moves[first, second] <= smallest:
            return tuple(chosen)
        moved = list(chosen)
        for move in (int(first), int(second)):
            moved[layers[move]] = int(places[move])
        if not problem.fits(moved):  # sums of errors are floats, and their order of summation differs
            return tuple(chosen)
        chosen = moved


def repaired(
    problem: Problem, choices: Sequence[int], *, values: Sequence[FloatArray] | None = None
) -> tuple[int, ...] | None:
    """The choices moved, one layer at a time, until the limits hold: always what costs least per excess removed.

    None where that ends without a plan.
    """
    chosen = list(choices)
    values = values or [problem.values(curve) for curve in problem.curves]
    shares = [
        np.array([problem.amounts(curve, what) / max(problem.room(what), 1e-9) for what in problem.limited])
        for curve in problem.curves
    ]
    while not problem.fits(chosen):
        held = np.sum([share[:, k] for share, k in zip(shares, chosen, strict=True)], axis=0)
        best: tuple[float, int, int] | None = None
        for layer, (share, value) in enumerate(zip(shares, values, strict=True)):
            others = (held - share[:, chosen[layer]])[:, None]
            excess = np.maximum(others + share - 1, 0).sum(0)
            removed = excess[chosen[layer]] - excess
            useful = removed > 1e-15
            if useful.any():
                rates = np.where(useful, (value - value[chosen[layer]]) / np.where(useful, removed, 1.0), np.inf)
                k = int(rates.argmin())
                if best is None or rates[k] < best[0]:
                    best = float(rates[k]), layer, k
        if best is None:
            return None
        chosen[best[1]] = best[2]
    return tuple(chosen)


def _at(arrays: Sequence[FloatArray], places: Sequence[IntArray]) -> FloatArray:
    """The entries of each array at its places, one after the other."""
    return np.concatenate([array[part] for array, part in zip(arrays, places, strict=True)])
