"""The best plan there is: a multiple-choice knapsack, solved as a mixed-integer linear programme and proven optimal.

Minimise Σ errors over one candidate per layer, subject to the limits (Kellerer, Pferschy and Pisinger, Knapsack
Problems, 2004, chapter 11). The linear relaxation prices the units; a candidate whose reduced cost exceeds the gap
between a plan at hand and the relaxation cannot be part of a better one. Of the tens of thousands of candidates that a
real network has, a few dozen per layer survive, and on them the integer programme is quick.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.optimize

from rankfold.curves import Curve, FloatArray, IntArray
from rankfold.errors import BudgetError
from rankfold.search.problem import Problem, Selection, check_feasible, costs_of, membership

START = 24
"""Candidates per layer in the integer programme, those of least reduced cost; more only where more can matter."""
GAP = 1e-6
"""Relative gap to the bound at which the solver may stop."""
ENOUGH = 1e-4
"""Relative gap to the linear relaxation at which a plan is good enough not to look among more candidates."""
NODES = 1000
"""Branch-and-bound nodes after which it stops all the same (about a second); the bound says how far it got."""


def exact(problem: Problem) -> Selection:
    """The plan of least total error within the limits, with a lower bound that proves how good it is."""
    check_feasible(problem)
    if not problem.curves:
        return Selection((), 0.0, 0.0)
    bound, reduced = _relax(problem)
    kept = [np.sort(np.argsort(part, kind="stable")[:START]) for part in reduced]
    best = _solve(problem, kept)
    gap = (best.objective - bound) * (1 + 1e-9) + 1e-12 if best else np.inf
    wider = [np.union1d(have, np.flatnonzero(part <= gap)) for have, part in zip(kept, reduced, strict=True)]
    proven = best is not None and gap <= ENOUGH * bound
    if not proven and any(len(more) > len(have) for more, have in zip(wider, kept, strict=True)):
        found = _solve(problem, wider)
        if found and (best is None or found.objective < best.objective):
            best = found
        elif best:
            best = replace(best, bound=found.bound if found else bound)
    if best is None:
        raise BudgetError(f"the solver found no plan within {NODES} nodes; loosen the budget or use search='uniform'")
    return replace(best, bound=bound if proven else min(max(bound, best.bound or bound), best.objective))


def _relax(problem: Problem) -> tuple[float, list[FloatArray]]:
    """Objective of the linear relaxation, and every candidate's reduced cost, per curve."""
    errors = np.concatenate([curve.errors for curve in problem.curves])
    shares = np.array([costs_of(problem.curves, unit) / max(problem.room(unit), 1) for unit in problem.units])
    result = scipy.optimize.linprog(
        errors,
        A_ub=shares,
        b_ub=np.ones(len(shares)),
        A_eq=membership(problem.curves),
        b_eq=np.ones(len(problem.curves)),
        bounds=(0, None),
        method="highs",
    )
    if result.status != 0:
        raise BudgetError(f"the linear relaxation of the budget was not solved: {result.message}")
    sizes = [len(curve) for curve in problem.curves]
    priced = errors - result.ineqlin.marginals @ shares - np.repeat(result.eqlin.marginals, sizes)
    return float(result.fun), np.split(np.maximum(priced, 0.0), np.cumsum(sizes)[:-1])


def _solve(problem: Problem, kept: list[IntArray]) -> Selection | None:
    """The best plan that uses the `kept` candidates alone; None where there is none.

    The solver's constraints hold to a tolerance, a budget holds exactly: limits are tightened until they do.
    """
    curves = [_subset(curve, chosen) for curve, chosen in zip(problem.curves, kept, strict=True)]
    errors = np.concatenate([curve.errors for curve in curves])
    shares = np.array([costs_of(curves, unit) / max(problem.room(unit), 1) for unit in problem.units])
    for slack in (0.0, 1e-9, 1e-7, 1e-6, 1e-5):
        result = scipy.optimize.milp(
            errors,
            constraints=[
                scipy.optimize.LinearConstraint(membership(curves), 1, 1),
                scipy.optimize.LinearConstraint(shares, -np.inf, 1.0 - slack),
            ],
            integrality=np.ones(len(errors)),
            bounds=scipy.optimize.Bounds(0, 1),
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
        if result.x is None:
            return None
        parts = np.split(result.x, np.cumsum([len(curve) for curve in curves])[:-1])
        choices = tuple(int(chosen[part.argmax()]) for part, chosen in zip(parts, kept, strict=True))
        if problem.fits(choices):
            return Selection(choices, problem.objective(choices), float(result.mip_dual_bound))
    return None


def _subset(curve: Curve, chosen: IntArray) -> Curve:
    """The curve with the chosen candidates alone."""
    return replace(
        curve,
        methods=tuple(curve.methods[k] for k in chosen),
        ranks=tuple(curve.ranks[k] for k in chosen),
        errors=curve.errors[chosen],
        costs={unit: cost[chosen] for unit, cost in curve.costs.items()},
    )
