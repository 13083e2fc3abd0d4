"""Curves against enumeration: on layers small enough to try every rank, pruning loses nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from rankfold.decompositions import DECOMPOSITIONS, expand, relative_error, wiring_of
from rankfold.decompositions.metric import Moment
from rankfold.decompositions.wiring import Call, LayerShape
from rankfold.plan import LayerSpec
from rankfold.search import candidates
from rankfold.search.candidates import BALANCE, measure_layer
from rankfold.search.forms import costs_at

SHAPE = LayerShape(7, 6, (3, 3), calls=(Call(1, (10, 10), (5, 5)),))
LAYER = LayerSpec("conv", "Conv2d", SHAPE, "float32", 4, (7, 6, 3, 3))


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 7, 6, 3, 3)


def every_candidate(name: str, weight: torch.Tensor) -> list[tuple[float, int, int]]:
    """Error that the closed-form factors reach, parameters and MACs of every useful and balanced tuple of ranks."""
    wiring, expansion = wiring_of(name, SHAPE), expand(name, weight, SHAPE)
    found = []
    for ranks in itertools.product(*(range(1, most + 1) for most in expansion.max_ranks())):
        if any(rank > most for rank, most in zip(ranks, wiring.largest_ranks(SHAPE, ranks), strict=True)):
            continue
        if DECOMPOSITIONS[name].balanced and abs(ranks[0] / 6 - ranks[-1] / 7) > max(BALANCE, 1 / 6) + 1e-12:
            continue
        error = relative_error(weight.double(), wiring, expansion.factors(ranks))
        found.append((error, wiring.params(SHAPE, ranks), wiring.macs(SHAPE, ranks)))
    return found


@pytest.mark.parametrize("units", [("params",), ("macs",), ("params", "macs")])
@pytest.mark.parametrize("name", ["svd", "spatial", "tucker"])
def test_no_tuple_of_ranks_beats_the_curve(name: str, units: tuple[str, ...], weight: torch.Tensor):
    curve = measure_layer(LAYER, weight, (name,), units=units)
    for error, params, macs in every_candidate(name, weight):
        cost = {"params": params, "macs": macs}
        if any(cost[unit] > getattr(LAYER.dense, unit) for unit in units):
            continue
        allowed = np.all([curve.costs[unit] <= cost[unit] for unit in units], axis=0)
        assert curve.errors[allowed].min(initial=np.inf) <= error + 1e-9


@pytest.mark.parametrize("name", ["tt", "ring"])
def test_a_trains_grid_holds_every_tuple_of_ranks_and_pruning_keeps_the_best(name: str, weight: torch.Tensor):
    wiring = wiring_of(name, SHAPE)
    curve = measure_layer(LAYER, weight, (name,), units=("params",))
    for grid in expand(name, weight, SHAPE).grids()[:1]:  # a ring's other grids are bounds, and have to be fitted
        largest = [int(axis[-1]) for axis in grid.ranks]
        assert all(len(axis) == most for axis, most in zip(grid.ranks, largest, strict=True)) or name == "ring"
        for place in np.ndindex(grid.errors.shape):
            ranks = [int(axis[k]) for axis, k in zip(grid.ranks, place, strict=True)]
            opened = ranks[0] * ranks[1] if name == "ring" else ranks[0]
            summed = ranks[0] * ranks[-1] if name == "ring" else ranks[-1]
            if any(rank > most for rank, most in zip(ranks, wiring.largest_ranks(SHAPE, ranks), strict=True)):
                continue
            if abs(opened / 6 - summed / 7) > 1 / 6 + 1e-12 or wiring.params(SHAPE, ranks) > LAYER.dense.params:
                continue
            allowed = curve.costs["params"] <= wiring.params(SHAPE, ranks)
            assert curve.errors[allowed].min() <= grid.errors[place] + 1e-12


def test_auto_is_no_worse_than_any_single_decomposition_at_any_cost(weight: torch.Tensor):
    together = measure_layer(LAYER, weight, tuple(DECOMPOSITIONS), units=("macs",))
    for name in DECOMPOSITIONS:
        alone = measure_layer(LAYER, weight, (name,), units=("macs",))
        for error, cost in zip(alone.errors, alone.costs["macs"], strict=True):
            assert together.errors[together.costs["macs"] <= cost].min() <= 1.01 * error  # some are interpolated


def test_a_bound_from_below_takes_no_candidate_from_another_decomposition():
    shape = LayerShape(16, 16, (3, 3), calls=(Call(1, (10, 10), (10, 10)),))
    layer = LayerSpec("conv", "Conv2d", shape, "float32", 4, (16, 16, 3, 3))
    weight = torch.randn(1, 16, 16, 3, 3, generator=torch.Generator().manual_seed(1))
    together = measure_layer(layer, weight, ("svd", "ring"), units=("macs",))
    alone = measure_layer(layer, weight, ("svd",), units=("macs",))
    assert any(together.family(k) for k in range(len(together)))  # rings that are not fitted yet
    kept = {together.ranks[k] for k in range(len(together)) if together.methods[k] == "svd"}
    known = [k for k in range(len(together)) if together.methods[k] and not together.family(k)]
    for k in range(1, len(alone)):
        cost, error = alone.costs["macs"][k], alone.errors[k]
        beaten = any(together.costs["macs"][j] <= cost and together.errors[j] <= error for j in known)
        assert alone.ranks[k] in kept or beaten


def test_interpolated_errors_are_within_a_third_of_what_is_reached(weight: torch.Tensor):
    from rankfold.decompositions import fit

    curve = measure_layer(LAYER, weight, ("cp3",), units=("params",))
    for ranks, error in list(zip(curve.ranks, curve.errors, strict=True))[1::4]:
        reached = relative_error(weight.double(), wiring_of("cp3", SHAPE), fit("cp3", weight, SHAPE, ranks))
        assert reached <= error * 1.3 + 1e-6


def test_what_others_beat_is_fitted_less_often_and_the_best_candidates_stay(monkeypatch: pytest.MonkeyPatch):
    """A sum of few terms, and noise, in the metric of some inputs: as CP it takes less than in any other form."""
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(4, size, generator=generator) for size in (24, 20, 3, 3)]
    noise = torch.randn(24, 20, 3, 3, generator=generator)
    weight = (torch.einsum("ro,ri,rh,rw->oihw", *factors) + 0.3 * noise)[None]
    rows = torch.randn(600, 180, generator=generator, dtype=torch.float64).cumsum(1)
    moments = {"conv": Moment(joint=(rows.mT @ rows)[None] / len(rows), positions=len(rows))}
    layer = LayerSpec("conv", "Conv2d", replace(SHAPE, outputs=24, inputs=20), "float32", 4, (24, 20, 3, 3))
    names = ("spatial", "tucker", "tt", "cp", "cp3")
    raced = measure_layer(layer, weight, names, moments=moments)
    monkeypatch.setattr(candidates, "BEATEN", float("inf"))
    whole = measure_layer(layer, weight, names, moments=moments)
    assert sum(map(len, raced.fits.values())) < sum(map(len, whole.fits.values()))
    for part in (0.1, 0.3, 0.6):
        best = [curve.errors[curve.costs["params"] <= part * layer.dense.params].min() for curve in (raced, whole)]
        assert best[0] == pytest.approx(best[1], rel=1e-6)


def test_costs_of_many_forms_are_those_of_each(weight: torch.Tensor):
    curve = measure_layer(LAYER, weight, ("spatial", "tucker", "cp3"))
    narrow = SHAPE.narrowed(4 / 7, 0.5)
    found = costs_at(curve, range(len(curve)), narrow)
    useless = 0
    for form, (method, ranks) in enumerate(zip(curve.methods, curve.ranks, strict=True)):
        wiring = None if method is None else wiring_of(method, narrow)
        if wiring is not None:
            largest = wiring.largest_ranks(narrow, ranks)
            if any(rank > most for rank, most in zip(ranks, largest, strict=True)):
                wiring, ranks, useless = None, (), useless + 1
        cost = LAYER.cost(narrow, wiring, ranks)
        assert {unit: int(found[unit][form]) for unit in found} == cost.as_dict() | {"latency": 0}
    assert 0 < useless < len(curve)
