"""The continuous form of the rank choice: a distribution over every layer's candidates, within the budget on average.

Minimise Σ_i (⟨p_i, v_i⟩ − τ H(p_i)) over distributions p_i, with Σ_i ⟨p_i, c_i⟩ within its limit for every limited cost
c. The minimiser is p_i = softmax(−(v_i + Σ μ c_i) / τ) with one multiplier μ per limit, shared by all layers: the
softmax of the published method with its logits in closed form, and the budget in place of its rank loss. As the
temperature τ falls to zero, p goes to the vertices of the linear relaxation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize

from rankfold.search.curves import FloatArray
from rankfold.search.problem import Problem, shares_of

_CYCLES = 8
_DOUBLINGS = 80


@dataclass(frozen=True)
class Relaxed:
    """Each layer's distribution over its candidates, and their reduced prices v + Σ μ c, the least of a layer zero.

    The likeliest candidate is that of least reduced price; the prices tell apart what is too unlikely for a number.
    """

    distributions: list[FloatArray]
    reduced: list[FloatArray]
    temperature: float


def relax(problem: Problem, prices: Sequence[FloatArray], temperature: float) -> Relaxed:
    """The minimiser at the prices v and the temperature τ of this module's head."""
    sizes = [len(price) for price in prices]
    starts = np.cumsum([0, *sizes[:-1]])
    flat = np.concatenate(prices)
    shares = shares_of(problem, problem.curves)
    multipliers = np.zeros(len(shares))

    def reduced() -> FloatArray:
        total = flat + multipliers @ shares if len(shares) else flat
        return np.asarray(total - np.repeat(np.minimum.reduceat(total, starts), sizes))

    def distribution() -> FloatArray:
        weights = np.exp(-reduced() / temperature)
        return np.asarray(weights / np.repeat(np.add.reduceat(weights, starts), sizes))

    def excess(multiplier: float, limit: int) -> float:
        multipliers[limit] = multiplier
        return float(shares[limit] @ distribution()) - 1.0

    for _ in range(_CYCLES if len(shares) > 1 else 1):
        before = multipliers.copy()
        for limit in range(len(shares)):
            multipliers[limit] = _root(excess, limit, max(float(np.ptp(flat)), 1e-12))
        if np.allclose(before, multipliers, rtol=1e-4, atol=0):
            break
    return Relaxed(np.split(distribution(), starts[1:]), np.split(reduced(), starts[1:]), temperature)


def cooled(problem: Problem, prices: Sequence[FloatArray], temperature: float) -> Relaxed:
    """`relax` at a temperature given as a share of the mean range of prices within a layer."""
    return relax(problem, prices, temperature * (float(np.mean([np.ptp(price) for price in prices])) or 1.0))


def _root(excess: Callable[[float, int], float], limit: int, scale: float) -> float:
    """The least multiplier, not negative, at which a limit holds on average."""
    if excess(0.0, limit) <= 0:
        return 0.0
    low, high = 0.0, scale
    for _ in range(_DOUBLINGS):
        if excess(high, limit) <= 0:
            root: Any = scipy.optimize.brentq(excess, low, high, args=(limit,), xtol=1e-12 * high, rtol=1e-11)
            return float(root)
        low, high = high, 4 * high
    return high


def entropy(distribution: FloatArray) -> float:
    """−Σ p log p, in nats."""
    positive = distribution[distribution > 0]
    return float(-(positive * np.log(positive)).sum())
