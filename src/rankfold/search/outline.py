"""Outlines: curves as few points, to be drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rankfold.plan import channels_named
from rankfold.search.curves import Curve
from rankfold.search.widths import Width

POINTS = 40
"""Points of an outline, at most."""


def outlines(curves: Sequence[Curve], widths: Sequence[Width], unit: str) -> dict[str, Any]:
    """Of every layer that has a choice the least error at shares of its cost in `unit`, as pairs; of channel sets at
    shares of their width. Squared relative errors, in JSON's types.
    """
    found = {curve.layer.name: _least(curve, unit) for curve in curves if len(curve) > 1}
    for one in widths:
        shares = [width / one.channels.size for width in one.widths]
        found[channels_named(one.channels.name)] = _pairs(shares, one.errors)
    return {"unit": unit, "points": found}


def _least(curve: Curve, unit: str) -> list[list[float]]:
    """The candidates that no cheaper one matches, at even distances."""
    costs, errors = curve.costs[unit], curve.errors
    order = np.lexsort((errors, costs))
    best = np.minimum.accumulate(errors[order])
    front = order[np.append(True, best[1:] < best[:-1])]
    chosen = front[np.unique(np.linspace(0, len(front) - 1, POINTS).round().astype(int))]
    return _pairs(costs[chosen] / max(int(costs[0]), 1), errors[chosen])


def _pairs(shares: Iterable[float], errors: Iterable[float]) -> list[list[float]]:
    pairs = zip(map(float, shares), map(float, errors), strict=True)
    return sorted([round(share, 5), float(f"{error:.5g}")] for share, error in pairs)
