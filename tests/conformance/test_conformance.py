"""The laws every decomposition obeys on every layer kind (design: full rank is exact, cost is as predicted, …)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import CASES, NAMES, Case
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold import Budget, Cost, compress
from rankfold.decompositions import DECOMPOSITIONS, expand, family_of, fit, reconstruct, relative_error, wiring_of
from rankfold.network.finding import find_layers
from rankfold.network.kinds import (
    FLOATS,
    LAYER_KINDS,
    factorised,
    shape_of,
    stage_factors,
    stage_weights,
    weight_of,
    weights_of_stages,
)
from rankfold.network.layouts import as_factors, write_factors_
from rankfold.plan import LayerPlan, Plan
from rankfold.search.candidates import measure_layer
from rankfold.training import geometry

each_name = pytest.mark.parametrize("name", NAMES)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


def middle_ranks(case: Case, name: str) -> tuple[int, ...]:
    """Ranks between one and the largest, lowered until none is of no use beside the others."""
    shape = shape_of(case.module)
    ranks = [max(1, rank // 2) for rank in expand(name, weight_of(case.module), shape).max_ranks()]
    wiring = wiring_of(name, shape)
    for _ in ranks:
        ranks = [min(rank, most) for rank, most in zip(ranks, wiring.largest_ranks(shape, ranks), strict=True)]
    if name == "ring" and len(ranks) > 1 and min(shape.inputs, shape.outputs) > 1:
        ranks[0] = 2  # a ring that carries its bond
    return tuple(ranks)


def replaced(module: nn.Module, name: str, ranks: tuple[int, ...]) -> tuple[nn.Sequential, torch.Tensor]:
    """The factorised layer, and the weight its factors stand for."""
    shape = shape_of(module)
    wiring = wiring_of(name, shape)
    factors = fit(name, weight_of(module), shape, ranks, sweeps=2)
    return factorised(module, wiring, ranks, stage_weights(module, wiring, factors)), reconstruct(wiring, factors)


def dense(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    """A copy of the layer with a (g, o, i, *taps) weight."""
    twin = copy.deepcopy(module)
    weight = weight.transpose(1, 2) if shape_of(module).transposed else weight
    twin.weight.data = weight.reshape(twin.weight.shape).to(twin.weight.dtype)
    return twin


def example(case: Case, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(case.inputs, generator=torch.Generator().manual_seed(3)).to(dtype)


def test_every_layer_kind_has_a_case():
    assert {type(case.module) for case in CASES} == set(LAYER_KINDS)


@each_case
@each_name
def test_full_rank_is_exact(case: Case, name: str):
    weight, shape = weight_of(case.module), shape_of(case.module)
    expansion = expand(name, weight, shape)
    factors = fit(name, weight, shape, expansion.max_ranks(), sweeps=0, expansion=expansion)
    assert relative_error(weight.double(), expansion.wiring, factors) < 1e-12


@each_case
@each_name
def test_factorised_layer_equals_dense_layer_with_reconstructed_weight(case: Case, name: str):
    module = copy.deepcopy(case.module).double()
    stages, weight = replaced(module, name, middle_ranks(case, name))
    x = example(case, torch.float64)
    torch.testing.assert_close(stages(x), dense(module, weight)(x), rtol=1e-9, atol=1e-9)


@each_case
@each_name
def test_stages_give_back_the_factors_they_were_made_from(case: Case, name: str):
    module, ranks = case.module, middle_ranks(case, name)
    shape = shape_of(module)
    wiring = wiring_of(name, shape)
    factors = fit(name, weight_of(module), shape, ranks, sweeps=0)
    stages = factorised(module, wiring, ranks, stage_weights(module, wiring, factors))
    for found, factor in zip(stage_factors(stages, module, wiring, ranks), factors, strict=True):
        assert torch.equal(found, factor.float())
    write_factors_(weights_of_stages(stages), shape, wiring, tuple(2 * factor for factor in factors))
    for found, factor in zip(stage_factors(stages, module, wiring, ranks), factors, strict=True):
        assert torch.equal(found, 2 * factor.float())


@each_case
@each_name
def test_scaled_gradients_of_stages_are_projections_of_the_weight_s(
    case: Case, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(geometry, "RIDGE", 1e-11)
    module, ranks = copy.deepcopy(case.module).double(), middle_ranks(case, name)
    shape, kind, size = shape_of(module), type(module).__name__, tuple(module.weight.shape)
    wiring, (stages, weight) = wiring_of(name, shape), replaced(module, name, ranks)
    twin, x = dense(module, weight), example(case, torch.float64)
    for one in (stages, twin):
        output = one(x)
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)).sum().backward()
    twin.weight.data = twin.weight.grad
    gradient, factors = weight_of(twin), stage_factors(stages, module, wiring, ranks)

    nothing = Cost(0, 0, 0)
    plan = Plan((LayerPlan("0", kind, size, name, ranks, nothing, nothing),), {}, nothing, nothing)
    energy = geometry.Geometry(nn.Sequential(stages), nn.Sequential(module), plan).scale_()
    steps = as_factors([one.weight.grad for one in stages if hasattr(one, "weight")], shape, wiring, ranks)
    moved = [reconstruct(wiring, (*factors[:k], step, *factors[k + 1 :])) for k, step in enumerate(steps)]
    torch.testing.assert_close(energy, sum((gradient * one).sum() for one in moved))
    for k, projection in enumerate(moved):
        direction = reconstruct(wiring, (*factors[:k], torch.randn_like(factors[k]), *factors[k + 1 :]))
        rest = ((gradient - projection) * direction).sum()
        assert abs(float(rest)) < 1e-5 * float(gradient.norm() * direction.norm())


@each_case
@each_name
def test_predicted_cost_is_the_measured_one(case: Case, name: str):
    ranks = middle_ranks(case, name)
    stages, _ = replaced(case.module, name, ranks)
    spec = find_layers(nn.Sequential(copy.deepcopy(case.module)), example(case)).found[0]
    wiring = wiring_of(name, spec.shape)
    bias = case.module.bias.numel() if case.module.bias is not None else 0
    assert sum(p.numel() for p in stages.parameters()) == wiring.params(spec.shape, ranks) + bias
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        stages(example(case))
    assert counter.get_total_flops() == 2 * wiring.macs(spec.shape, ranks)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        case.module(example(case))
    assert counter.get_total_flops() == 2 * spec.dense.macs


@each_case
@each_name
def test_errors_fall_with_rank_and_bound_what_the_factors_reach(case: Case, name: str):
    weight = weight_of(case.module).double()
    expansion = expand(name, weight, shape_of(case.module))
    for grid in expansion.grids():
        for axis in range(grid.errors.ndim):
            assert (np.diff(grid.errors, axis=axis) <= 1e-12).all()
        places = np.argwhere(np.isfinite(grid.errors))
        for place in places[:: max(1, len(places) // 12)]:
            ranks = [int(axis[k]) for axis, k in zip(grid.ranks, place, strict=True)]
            reached = relative_error(weight, expansion.wiring, expansion.factors(ranks))
            if DECOMPOSITIONS[name].optimistic and family_of(name, shape_of(case.module), ranks):
                assert reached >= grid.errors[tuple(place)] - 1e-9
            else:
                assert reached <= grid.errors[tuple(place)] + 1e-9


@each_case
@each_name
def test_no_candidate_is_larger_than_the_layer(case: Case, name: str):
    spec = find_layers(nn.Sequential(copy.deepcopy(case.module)), example(case)).found[0]
    curve = measure_layer(spec, weight_of(case.module), (name,))
    assert curve.methods[0] is None
    assert curve.errors[0] == 0
    for unit, costs in curve.costs.items():
        assert (costs <= getattr(spec.dense, unit)).all()
    for method, ranks, params, macs in zip(
        curve.methods[1:], curve.ranks[1:], curve.costs["params"][1:], curve.costs["macs"][1:], strict=True
    ):
        wiring = wiring_of(method, spec.shape)
        assert params == wiring.params(spec.shape, ranks)
        assert macs == wiring.macs(spec.shape, ranks)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_name
def test_every_dtype_is_kept(dtype: torch.dtype, name: str):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10)
    )
    model = model.to(dtype).eval()
    x = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = compress(model, x, decomposition=name, budget=Budget(params=0.6), calibration="none")
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.after.params <= 0.6 * result.before.params
    assert result.model(x).dtype == dtype
    assert torch.isfinite(result.model(x)).all()


@each_case
def test_stages_are_stock_modules(case: Case):
    for name in NAMES:
        stages, _ = replaced(case.module, name, middle_ranks(case, name))
        assert {type(stage).__module__.split(".")[:2][0] for stage in stages} == {"torch"}
        assert all(type(stage).__module__.startswith("torch.nn") for stage in stages)
