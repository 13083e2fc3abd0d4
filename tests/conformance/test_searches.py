"""The laws every search obeys: within budget, never larger, deterministic, and the exact one as good as brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import NAMES, SEARCH_NAMES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankfold import Budget, BudgetError, compress
from rankfold.budget import UNITS, Cost
from rankfold.decompositions.wiring import Call, LayerShape
from rankfold.plan import LayerSpec
from rankfold.search import SEARCHES, Problem
from rankfold.search.candidates import pareto
from rankfold.search.curves import Curve

NEED_WEIGHTS = {"evbmf"}
"""Searches that look at the weights, which random problems have none of."""


def random_problem(seed: int, layers: int, candidates: int, units: tuple[str, ...], fraction: float) -> Problem:
    rng = np.random.default_rng(seed)
    curves = []
    for index in range(layers):
        shape = LayerShape(32, 32, (3, 3), calls=(Call(1, (8, 8), (8, 8)),))
        spec = LayerSpec(f"layer{index}", "Conv2d", shape, "float32", 4, (32, 32, 3, 3))
        share = np.append(1.0, np.sort(rng.uniform(0.05, 0.95, candidates))[::-1])
        costs = {
            "params": (share * spec.dense.params).astype(np.int64),
            "macs": (np.minimum(1, share * rng.uniform(0.9, 1.1, candidates + 1)) * spec.dense.macs).astype(np.int64),
        }
        costs["macs"][0] = spec.dense.macs
        costs["bytes"] = 4 * costs["params"]
        errors = np.append(0.0, np.sort(rng.uniform(0, 1, candidates)))
        methods = (None, *["svd"] * candidates)
        curves.append(Curve(spec, ("svd",), methods, ((), *[(1,)] * candidates), errors, costs))
    total = Cost(*(sum(int(c.costs[unit][0]) for c in curves) for unit in UNITS))
    limits = {unit: int(fraction * getattr(total, unit)) for unit in units}
    return Problem(tuple(curves), limits, Cost(0, 0, 0), total)


@pytest.mark.parametrize("units", [("macs",), ("params", "macs"), UNITS])
@given(seed=st.integers(0, 10**6), fraction=st.floats(0.25, 0.95))
def test_exact_search_equals_brute_force_on_three_layers(units: tuple[str, ...], seed: int, fraction: float):
    problem = random_problem(seed, 3, 7, units, fraction)
    plans = itertools.product(*(range(len(curve)) for curve in problem.curves))
    objectives = [problem.objective(choices) for choices in plans if problem.fits(choices)]
    if not objectives:
        with pytest.raises(BudgetError):
            SEARCHES["exact"](problem)
        return
    found = SEARCHES["exact"](problem)
    assert problem.fits(found.choices)
    assert found.objective <= min(objectives) * (1 + 2e-4) + 1e-9
    assert found.bound <= min(objectives) + 1e-9


@pytest.mark.parametrize("name", SEARCH_NAMES)
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), fraction=st.floats(0.3, 1.0))
def test_every_search_keeps_every_limit_and_none_beats_the_bound(name: str, seed: int, fraction: float):
    if name in NEED_WEIGHTS:
        return
    problem = random_problem(seed, 6, 12, ("params", "macs"), fraction)
    try:
        found = SEARCHES[name](problem)
    except BudgetError:
        return
    assert problem.fits(found.choices)
    assert found.objective == pytest.approx(problem.objective(found.choices))
    assert found.objective >= SEARCHES["exact"](problem).bound - 1e-9
    assert SEARCHES[name](problem).choices == found.choices


@pytest.mark.parametrize("name", SEARCH_NAMES)
def test_infeasible_budget_names_one_that_is_feasible(name: str, small_cnn: nn.Module, image: torch.Tensor):
    with pytest.raises(BudgetError, match="smallest feasible one is macs=") as caught:
        compress(small_cnn, image, decomposition="svd", budget=Budget(macs=0.001), search=name, calibration="none")
    smallest = float(str(caught.value).split("smallest feasible one is macs=")[1].split(" ")[0])
    assert (
        compress(
            small_cnn, image, decomposition="svd", budget=Budget(macs=smallest), search=name, calibration="none"
        ).model
        is not None
    )
    with pytest.raises(BudgetError):
        compress(
            small_cnn, image, decomposition="svd", budget=Budget(macs=smallest * 0.99), search=name, calibration="none"
        )


def test_infeasible_joint_budget_names_one_that_is_feasible(small_cnn: nn.Module, image: torch.Tensor):
    with pytest.raises(BudgetError, match="smallest feasible one") as caught:
        compress(small_cnn, image, decomposition="spatial", budget=Budget(macs=0.05, params=0.002), calibration="none")
    text = str(caught.value).split("smallest feasible one is ")[1].split(";")[0]
    limits = [part.split(" (")[0] for part in text.split("), ")]
    assert (
        compress(
            small_cnn, image, decomposition="spatial", budget=Budget.parse(limits), calibration="none"
        ).after.params
        > 0
    )


@pytest.mark.parametrize(
    ("name", "search"), [*((name, "exact") for name in NAMES), *(("auto", search) for search in SEARCH_NAMES)]
)
def test_compression_keeps_the_budget_and_every_layer_within_its_size(
    name: str, search: str, small_cnn: nn.Module, image: torch.Tensor
):
    budget = Budget(macs=0.6, params=0.5)
    result = compress(small_cnn, image, decomposition=name, budget=budget, search=search, calibration="none")
    for unit, limit in budget.limits(result.before).items():
        assert getattr(result.after, unit) <= limit
        for layer in result.plan.layers:
            assert getattr(layer.after, unit) <= getattr(layer.before, unit)
    again = compress(small_cnn, image, decomposition=name, budget=budget, search=search, calibration="none")
    assert again.plan.layers == result.plan.layers


@given(
    st.lists(st.tuples(*[st.integers(0, 9)] * 4), min_size=1, max_size=40),
    st.integers(1, 3),
)
def test_pruning_loses_nothing(points: list[tuple[int, ...]], count: int):
    errors = np.array([float(p[0]) for p in points])
    costs = [np.array([p[k] for p in points]) for k in range(1, 1 + count)]
    kept = set(pareto(errors, costs).tolist())
    for index in range(len(points)):
        matched = [k for k in kept if errors[k] <= errors[index] and all(c[k] <= c[index] for c in costs)]
        assert matched
    for index in kept:
        others = [k for k in kept if k != index]
        assert not any(errors[k] <= errors[index] and all(c[k] <= c[index] for c in costs) for k in others)


@pytest.mark.parametrize("units", [(), ("params",)])
@given(seed=st.integers(0, 10**6), error=st.floats(0.02, 0.6), fraction=st.floats(0.4, 0.95))
def test_exact_search_for_least_cost_equals_brute_force(
    units: tuple[str, ...], seed: int, error: float, fraction: float
):
    problem = replace(random_problem(seed, 3, 7, units, fraction), error=3 * error, minimise="macs")
    plans = itertools.product(*(range(len(curve)) for curve in problem.curves))
    objectives = [problem.objective(choices) for choices in plans if problem.fits(choices)]
    if not objectives:
        with pytest.raises(BudgetError):
            SEARCHES["exact"](problem)
        return
    found = SEARCHES["exact"](problem)
    assert problem.fits(found.choices)
    assert found.objective <= min(objectives) * (1 + 2e-4) + 1e-9
    assert found.bound <= min(objectives) + 1e-9


@pytest.mark.parametrize("name", SEARCH_NAMES)
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), error=st.floats(0.02, 0.9))
def test_every_search_keeps_a_limit_on_the_error_and_is_no_cheaper_than_the_bound(name: str, seed: int, error: float):
    if name in NEED_WEIGHTS:
        return
    problem = replace(random_problem(seed, 6, 12, (), 1.0), error=6 * error, minimise="params")
    found = SEARCHES[name](problem)
    assert problem.fits(found.choices)
    assert found.objective == pytest.approx(problem.objective(found.choices))
    assert found.objective >= SEARCHES["exact"](problem).bound - 1e-9


@pytest.mark.parametrize(
    ("search", "name"),
    [*((search, "tucker") for search in SEARCH_NAMES), ("exact", "cp3"), ("rene", "spatial")],
)
def test_a_limit_on_the_error_holds_for_the_factors_that_come_out(
    name: str, search: str, small_cnn: nn.Module, image: torch.Tensor
):
    result = compress(
        small_cnn, image, decomposition=name, budget=Budget(error=0.25), search=search, calibration="none"
    )
    mean = sum(layer.error for layer in result.plan.layers) / len(result.plan.layers)
    assert 0 < mean <= 0.25 * (1 + 1e-6)
    assert result.after.macs < result.before.macs
