"""Ranks by empirical variational Bayes matrix factorisation: how many singular values are not noise.

Nakajima, Sugiyama, Babacan and Tomioka, Global analytic solution of fully-observed variational Bayesian matrix
factorization, JMLR 14 (2013), 1-37: theorem 2 and corollary 1 (the threshold), theorem 4 and lemma 8 (the noise). Used
for Tucker ranks of convolutions by Kim et al., arXiv 1511.06530. There is no budget in it: the ranks found say how
layers compare, and all are scaled by one factor until the limits hold.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float
from torch import Tensor

from rankfold.decompositions import wiring_of
from rankfold.decompositions.expansion import unfold
from rankfold.decompositions.wiring import LayerShape, Wiring
from rankfold.errors import BudgetError
from rankfold.progress import Progress, silent
from rankfold.search.baselines import at_best_level
from rankfold.search.curves import Curve, FloatArray
from rankfold.search.problem import Problem, Selection

_TAU = 2.5129
"""The zero of Φ(τ) = log(τ + 1)/τ + log(τ/α + 1)·α/τ − ½ is close to this times √α (Nakajima et al., equation 22)."""


def evbmf(problem: Problem, progress: Progress = silent, /) -> Selection:
    """The ranks of `evbmf_ranks`, all multiplied by the largest common factor that meets the limits.

    Among its candidates whose ranks do not exceed these, a layer takes the one of least error; where there is none, its
    cheapest. Where the error is limited, the factor is the smallest that meets that. Raises BudgetError for a problem
    without weights.
    """
    tops = []
    for done, curve in enumerate(problem.curves):
        progress("searching ranks", done, len(problem.curves))
        if curve.weight is None:
            raise BudgetError("search 'evbmf' needs the weights, and the problem has none; leave out 'interpolative'")
        tops.append({name: evbmf_ranks(name, curve.weight, curve.layer.shape) for name in curve.tried})

    def choose(level: float) -> tuple[int, ...]:
        factor = level / (1 - level) if level < 1 else math.inf
        return tuple(_within(curve, top, factor, problem) for curve, top in zip(problem.curves, tops, strict=True))

    return at_best_level(problem, choose, "evbmf")


def evbmf_ranks(name: str, weight: Float[Tensor, "g o i *taps"], shape: LayerShape) -> tuple[int, ...]:
    """A rank for every bond of a decomposition of the weight: that of the matrix which cutting the bond makes.

    A bond that all factors share (CP) gets the largest rank of the matrices that cutting off a factor makes, one that
    is carried around a ring gets one.
    """
    wiring = wiring_of(name, shape)
    weight = weight.double()
    axes = "oi" + shape.taps
    if len(wiring.bonds) == 1:
        rows = [_own_axes(factor) for factor in wiring.factors]
        return (max(matrix_rank(unfold(weight, axes, part)) for part in rows),)
    ranks = []
    for bond in wiring.bonds:
        if _closes(wiring, bond):
            ranks.append(1)
            continue
        last = max(position for position, factor in enumerate(wiring.factors) if bond in factor)
        left = "".join(_own_axes(factor) for factor in wiring.factors[:last])
        ranks.append(matrix_rank(unfold(weight, axes, left)))
    return tuple(ranks)


def matrix_rank(matrix: Float[Tensor, "g n m"]) -> int:
    """How many components of a matrix the analytic solution keeps; of several, the most; at least one."""
    return max(1, *(_components(torch.linalg.svdvals(one).square().numpy(), tuple(one.shape)) for one in matrix.cpu()))


def _components(energies: FloatArray, shape: tuple[int, ...]) -> int:
    """How many squared singular values exceed the threshold at the noise variance of least free energy."""
    short, long = sorted(shape)
    total = float(energies.sum())
    if total == 0:
        return 0
    alpha = short / long
    tau = _TAU * math.sqrt(alpha)
    threshold = (1 + tau) * (1 + alpha / tau)
    most = max(0, math.ceil(short / (1 + alpha)) - 1)
    upper = total / (short * long)
    tail = float(energies[most:].mean()) / long if most < short else 0.0
    lower = max(float(energies[min(most, short - 1)]) / (long * threshold), tail, upper * 1e-12)

    def free_energy(log_variance: float) -> float:
        x = energies / (long * math.exp(log_variance))
        kept = x[x > threshold]
        spread = kept - (1 + alpha)
        tau_x = (spread + np.sqrt(np.maximum(spread**2 - 4 * alpha, 0.0))) / 2
        gain = np.log(tau_x + 1) + alpha * np.log(tau_x / alpha + 1) - tau_x
        return float((x - np.log(np.maximum(x, 1e-300))).sum() + gain.sum())

    grid = np.linspace(math.log(lower), math.log(max(upper, lower * (1 + 1e-9))), 64)
    best = int(np.argmin([free_energy(point) for point in grid]))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = scipy.optimize.minimize_scalar(free_energy, bounds=around, method="bounded", options={"xatol": 1e-6})
    return int((energies > long * math.exp(found.x) * threshold).sum())


def _own_axes(factor: str) -> str:
    """The weight's axes of a factor."""
    return "".join(letter for letter in factor if letter.islower())


def _closes(wiring: Wiring, bond: str) -> bool:
    """Whether a bond ties the last factor to the first: it is carried around a ring."""
    return len(wiring.factors) > 2 and bond in wiring.factors[0] and bond in wiring.factors[-1]


def _within(curve: Curve, tops: dict[str, tuple[int, ...]], factor: float, problem: Problem) -> int:
    """The candidate of least error whose ranks are within `factor` times the top ones of its decomposition."""
    if factor == math.inf:
        return 0
    allowed = []
    for k, (method, ranks) in enumerate(zip(curve.methods, curve.ranks, strict=True)):
        if method is not None and all(rank <= factor * top for rank, top in zip(ranks, tops[method], strict=True)):
            allowed.append(k)
    return min(allowed, key=lambda k: curve.errors[k]) if allowed else int(problem.pressure(curve).argmin())
