"""The best plan there is: a multiple-choice knapsack, solved as a mixed-integer linear programme, with a proven bound.

Minimise the sum of values (errors, or costs where the error is limited) over one candidate per layer, within the limits
(Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11). The linear relaxation prices what is limited. A
plan read off it is often within 0.02 % of the relaxation, and then it is taken; otherwise the integer programme is
solved, first over the candidates of least reduced cost, then over those whose reduced cost is below the gap that is
left: no other can be part of a better plan.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.optimize

from rankfold.errors import BudgetError
from rankfold.progress import Progress, silent
from rankfold.search.curves import FloatArray, IntArray, subset
from rankfold.search.problem import Problem, Selection, check_feasible, membership, shares_of
from rankfold.search.rounding import polished, repaired

START = 24
"""Candidates per layer in the first integer programme: those of least reduced cost."""
ENOUGH = 2e-4
"""Relative gap to the linear relaxation at which the first plan is taken: no plan is better by more than this."""
MANY = 2000
"""Candidates in the second programme, at most: where no more than these can be part of a better plan, it is solved to a
gap of 1e-6; otherwise these, the likeliest, are, and the relaxation is the bound."""
NODES = 1000
"""Branch-and-bound nodes after which a programme stops in any case; the bound then says how far it got.

A limit of time would make plans depend on the machine's load.
"""


def exact(problem: Problem, progress: Progress = silent, /) -> Selection:
    """The best plan within the limits, with a lower bound on the objective that proves how good it is."""
    check_feasible(problem)
    if not problem.curves:
        return Selection((), 0.0, 0.0)
    bound, reduced, rounded = _relax(problem)
    if rounded and rounded.objective <= bound * (1 + ENOUGH):
        return rounded
    near = [np.sort(np.argsort(part, kind="stable")[:START]) for part in reduced]
    first = _solve(problem, near, gap=ENOUGH / 2)
    if first and first.objective <= bound * (1 + ENOUGH):
        return replace(first, bound=bound)
    at_hand = min((plan.objective for plan in (rounded, first) if plan), default=np.inf)
    gap = (at_hand - bound) * (1 + 1e-9) + 1e-12
    wider, whole = _within(problem, near, reduced, gap)
    second = _solve(problem, wider, gap=1e-6 if whole else ENOUGH / 2)
    plans = [plan for plan in (rounded, first, second) if plan]
    if not plans:
        raise BudgetError(f"the solver found no plan within {NODES} nodes; loosen the budget or use search='uniform'")
    best = min(plans, key=lambda plan: plan.objective)
    proven = second.bound if whole and second and second.bound is not None else bound
    return replace(best, bound=min(max(bound, proven), best.objective))


def _within(
    problem: Problem, near: list[IntArray], reduced: list[FloatArray], gap: float
) -> tuple[list[IntArray], bool]:
    """The candidates whose reduced cost is within a gap, about `MANY` of them at most; and whether it is all.

    Where they are more, every layer keeps as many, of those that cost alike the ones of least reduced cost: those of a
    fine grid would otherwise crowd out the others.
    """
    within = [np.flatnonzero(part <= gap) for part in reduced]
    whole = sum(map(len, within)) <= MANY
    if not whole:
        quota = max(1, MANY // len(within))
        for layer, (curve, chosen) in enumerate(zip(problem.curves, within, strict=True)):
            by_cost = chosen[np.argsort(problem.pressure(curve)[chosen], kind="stable")]
            alike = np.array_split(by_cost, min(quota, max(len(by_cost), 1)))
            within[layer] = np.array(
                [part[reduced[layer][part].argmin()] for part in alike if len(part)], dtype=np.int64
            )
    return [np.union1d(have, more) for have, more in zip(near, within, strict=True)], whole


def _relax(problem: Problem) -> tuple[float, list[FloatArray], Selection | None]:
    """The linear relaxation: its objective, every candidate's reduced cost per curve, and the plan nearest to it."""
    values = np.concatenate([problem.values(curve) for curve in problem.curves])
    shares = shares_of(problem, problem.curves)
    result = scipy.optimize.linprog(
        values,
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
    priced = values - result.ineqlin.marginals @ shares - np.repeat(result.eqlin.marginals, sizes)
    cuts = np.cumsum(sizes)[:-1]
    reduced = np.split(np.maximum(priced, 0.0), cuts)
    return float(result.fun), reduced, _rounded(problem, np.split(result.x, cuts), reduced, bound=float(result.fun))


def _rounded(
    problem: Problem, shares: list[FloatArray], reduced: list[FloatArray], *, bound: float
) -> Selection | None:
    """A plan made of the relaxation: of a layer's fractional candidates the cheapest, then swaps while they help.

    The relaxation splits no more layers than there are limits, so on a large network this comes very close.
    """
    choices = []
    for curve, share in zip(problem.curves, shares, strict=True):
        used = np.flatnonzero(share > 1e-9)
        choices.append(int(used[problem.pressure(curve)[used].argmin()]))
    start = repaired(problem, choices)
    if start is None:
        return None
    polish = polished(problem, start, reduced)
    return Selection(polish, problem.objective(polish), bound)


def _solve(problem: Problem, kept: list[IntArray], *, gap: float) -> Selection | None:
    """The best plan that uses the `kept` candidates alone; None where there is none.

    The solver's constraints hold to a tolerance, a budget holds exactly: limits are tightened until they do.
    """
    curves = [subset(curve, chosen) for curve, chosen in zip(problem.curves, kept, strict=True)]
    values = np.concatenate([problem.values(curve) for curve in curves])
    shares = shares_of(problem, curves)
    for slack in (0.0, 1e-9, 1e-7, 1e-6, 1e-5):
        result = scipy.optimize.milp(
            values,
            constraints=[
                scipy.optimize.LinearConstraint(membership(curves), 1, 1),
                scipy.optimize.LinearConstraint(shares, -np.inf, 1.0 - slack),
            ],
            integrality=np.ones(len(values), dtype=np.int64),
            bounds=scipy.optimize.Bounds(0, 1),
            options={"mip_rel_gap": gap, "node_limit": NODES},
        )
        if result.x is None:
            return None
        parts = np.split(result.x, np.cumsum([len(curve) for curve in curves])[:-1])
        choices = tuple(int(chosen[part.argmax()]) for part, chosen in zip(parts, kept, strict=True))
        if problem.fits(choices):
            return Selection(choices, problem.objective(choices), float(result.mip_dual_bound))
    return None
