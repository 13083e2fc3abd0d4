"""CP without terms that cancel each other: a little error for factors that bear rounding and training.

Least squares alone drives the rank-one terms of a CP to large norms that nearly cancel (De Silva and Lim, SIAM J.
Matrix Anal. Appl. 30 (2008)). Σ_r ‖term r‖² / ‖Ŵ‖² says how far: the square of how much a relative error of a factor's
entries grows in the weight, be it from a step of training or from rounding to a narrow dtype. Phan et al., arXiv
2008.05441, minimise such a sensitivity under a bound on the error before they fine-tune; here the two are added:
‖Ŵ − Ŵ′‖² + δ Σ_r ‖term r of Ŵ′‖² of the new factors' weight Ŵ′ is least squares in one factor at a time as before.
"""

from __future__ import annotations

from rankfold.decompositions.als import alternate, balance, term_energy
from rankfold.decompositions.contractions import is_polyadic, reconstruct
from rankfold.decompositions.expansion import Factors
from rankfold.decompositions.wiring import Wiring

SWEEPS = 200
"""Rounds of least squares, at most."""


def sensitivity(wiring: Wiring, factors: Factors) -> float:
    """Σ_r ‖term r‖² / ‖Ŵ‖² of a CP: at least 1 / rank, and 1 where its terms are orthogonal to each other."""
    return term_energy(wiring, factors) / max(float(reconstruct(wiring, factors).square().sum()), 1e-300)


def damped(wiring: Wiring, factors: Factors, damping: float) -> Factors:
    """Factors (float64) of nearly the same weight whose terms cancel less; those of another wiring as they are."""
    if not damping or not is_polyadic(wiring):
        return factors
    weight = reconstruct(wiring, factors)
    found = alternate(weight, wiring, factors, sweeps=SWEEPS, tolerance=1e-4, damping=damping)
    return balance(wiring, found)
