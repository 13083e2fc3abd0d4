"""The laws every decomposition obeys on every layer kind (design: full rank is exact, cost is as predicted, …)."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, NAMES, Case
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold import Budget, Cost, compress
from rankfold.decompositions import DECOMPOSITIONS, expand, family_of, fit, reconstruct, relative_error, wiring_of
from rankfold.network.factorised import Factorised, TransposedLinear, as_plain
from rankfold.network.finding import find_layers
from rankfold.network.kinds import (
    FLOATS,
    LAYER_KINDS,
    factorised,
    known_kind,
    shape_of,
    stage_factors,
    stage_weights,
    weight_of,
    weights_of_stages,
)
from rankfold.network.layouts import as_factors, write_factors_
from rankfold.network.stand_ins.stack import FactorBlocks, Stack
from rankfold.plan import LayerPlan, Plan
from rankfold.search.candidates import measure_layer
from rankfold.training import geometry

each_name = pytest.mark.parametrize("name", NAMES)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


@functools.cache
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


@functools.cache
def fitted(case: Case, name: str) -> tuple[torch.Tensor, ...]:
    """Factors of a case's layer at middle ranks."""
    return fit(name, weight_of(case.module), shape_of(case.module), middle_ranks(case, name), sweeps=2)


def replaced(case: Case, name: str, dtype: torch.dtype = torch.float32) -> tuple[Factorised, torch.Tensor]:
    """The factorised layer at middle ranks, and the weight its factors stand for."""
    module = copy.deepcopy(case.module).to(dtype)
    shape, factors = shape_of(module), tuple(factor.clone() for factor in fitted(case, name))
    wiring = wiring_of(name, shape)
    stages = factorised(module, wiring, middle_ranks(case, name), stage_weights(module, wiring, factors))
    return stages, reconstruct(wiring, factors)


def dense(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    """A copy of the layer with a (g, o, i, *taps) weight."""
    twin = copy.deepcopy(module)
    turned = shape_of(module).transposed or (isinstance(module, Stack) and not module.by_rows)
    weight = weight.transpose(1, 2) if turned else weight
    twin.weight.data = weight.reshape(twin.weight.shape).to(twin.weight.dtype)
    return twin


def test_every_layer_kind_has_a_case():
    assert {known_kind(case.module).module for case in CASES} == set(LAYER_KINDS)


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
    stages, weight = replaced(case, name, torch.float64)
    given = case.arguments(torch.float64)
    torch.testing.assert_close(stages(*given), dense(module, weight)(*given), rtol=1e-9, atol=1e-9)


@each_case
@each_name
def test_stages_give_back_the_factors_they_were_made_from(case: Case, name: str):
    module, ranks = case.module, middle_ranks(case, name)
    shape = shape_of(module)
    wiring = wiring_of(name, shape)
    factors = tuple(factor.clone() for factor in fitted(case, name))
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
    wiring, (stages, weight) = wiring_of(name, shape), replaced(case, name, torch.float64)
    twin, given = dense(module, weight), case.arguments(torch.float64)
    for one in (stages, twin):
        output = one(*given)
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)).sum().backward()
    twin.weight.data = twin.weight.grad
    gradient, factors = weight_of(twin), stage_factors(stages, module, wiring, ranks)

    nothing = Cost(0, 0, 0)
    plan = Plan((LayerPlan("0", kind, size, name, ranks, nothing, nothing),), {}, nothing, nothing)
    energy = geometry.Geometry(nn.Sequential(stages), nn.Sequential(module), plan).scale_()
    steps = as_factors([one.grad for one in weights_of_stages(stages)], shape, wiring, ranks)
    moved = [reconstruct(wiring, (*factors[:k], step, *factors[k + 1 :])) for k, step in enumerate(steps)]
    torch.testing.assert_close(energy, sum((gradient * one).sum() for one in moved))
    for k, projection in enumerate(moved):
        direction = reconstruct(wiring, (*factors[:k], torch.randn_like(factors[k]), *factors[k + 1 :]))
        rest = ((gradient - projection) * direction).sum()
        assert abs(rest.item()) < 1e-5 * float(gradient.norm() * direction.norm())


@each_case
@each_name
def test_predicted_cost_is_the_measured_one(case: Case, name: str):
    ranks = middle_ranks(case, name)
    stages, _ = replaced(case, name)
    spec = find_layers(copy.deepcopy(case.module), case.arguments()).found[0]
    wiring = wiring_of(name, spec.shape)
    bias = getattr(case.module, "bias", None)
    biases = 0 if bias is None else bias.numel()
    assert sum(p.numel() for p in stages.parameters()) == wiring.params(spec.shape, ranks) + biases
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        stages(*case.arguments())
    assert counter.get_total_flops() == 2 * wiring.macs(spec.shape, ranks)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        case.module(*case.arguments())
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
    spec = find_layers(copy.deepcopy(case.module), case.arguments()).found[0]
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


OWN = {nn.Embedding: {TransposedLinear}, Stack: {FactorBlocks}}
"""Classes of this package among the stages, by the layer; all other stages are stock modules."""


@each_case
@each_name
def test_stages_are_stock_modules_but_for_those_of_lookups_and_stacks(case: Case, name: str):
    stages, _ = replaced(case, name)
    own = {type(stage) for stage in stages if not type(stage).__module__.startswith("torch.nn.")}
    assert own == OWN.get(type(case.module), set())


@each_case
@each_name
def test_a_stand_in_answers_as_the_layer_it_replaces(case: Case, name: str):
    module, (stages, weight) = case.module, replaced(case, name)
    attributes = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    assert attributes.keys() >= {"training"}
    for key, value in attributes.items():
        assert getattr(stages, key) == value, key
    bias = getattr(module, "bias", None)
    assert stages.bias is None if bias is None else torch.equal(stages.bias, bias)
    found, wanted = stages.weight, dense(module, weight).weight
    assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@each_case
@each_name
def test_the_weight_of_a_stand_in_is_differentiable_in_every_factor(case: Case, name: str):
    stages, _ = replaced(case, name, torch.float64)
    direction = torch.randn(case.module.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, step = weights_of_stages(stages)[0], 1e-6
    (stages.weight * direction).sum().backward()
    assert all(bool(one.grad.abs().max() > 0) for one in weights_of_stages(stages))
    with torch.no_grad():
        before, slope = (stages.weight * direction).sum(), first.grad.square().sum()
        first += step * first.grad
        change = (stages.weight * direction).sum() - before
    torch.testing.assert_close(change, step * slope, rtol=1e-4, atol=1e-10)  # linear in any one factor


@each_case
@each_name
def test_state_of_a_stand_in_is_that_of_a_plain_sequence_of_its_stages(case: Case, name: str):
    stages, _ = replaced(case, name)
    plain = nn.Sequential(*stages.children())
    own, other = stages.state_dict(keep_vars=True), plain.state_dict(keep_vars=True)
    assert list(own) == list(other)
    assert all(own[key] is other[key] for key in own)
    assert {key.split(".")[1] for key in own} <= {"weight", "bias"}


@each_case
@each_name
def test_a_plain_form_has_no_class_of_this_package_but_for_lookups_and_stacks(case: Case, name: str):
    stages, _ = replaced(case, name)
    holder = nn.ModuleDict({"layer": stages})
    before = {key: value.clone() for key, value in holder.state_dict().items()}
    outputs = stages(*case.arguments())
    plain = as_plain(holder)
    assert plain is holder
    own = {type(one) for one in plain.modules() if type(one).__module__.startswith("rankfold")}
    left = {type(stages)} if isinstance(case.module, Stack) else set()
    assert own == left | OWN.get(type(case.module), set())
    assert torch.equal(plain["layer"](*case.arguments()), outputs)
    assert list(plain.state_dict()) == list(before)
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in before.items())
    root = as_plain(replaced(case, name)[0])
    assert torch.equal(root(*case.arguments()), outputs)


@each_case
@each_name
def test_copies_and_pickles_of_a_stand_in_are_stand_ins_of_their_own(case: Case, name: str):
    stages, _ = replaced(case, name)
    outputs, weight = stages(*case.arguments()), stages.weight.detach().clone()
    file = io.BytesIO()
    torch.save(stages, file)
    file.seek(0)
    for other in (copy.deepcopy(stages), torch.load(file, weights_only=False)):
        assert torch.equal(other(*case.arguments()), outputs)
        assert torch.equal(other.weight, weight)
        with torch.no_grad():
            weights_of_stages(other)[0].zero_()
        assert torch.equal(stages.weight, weight)
        assert not other.weight.any()


def exported(stages: nn.Module, given: tuple[Any, ...]) -> nn.Module:
    """The exported program, as a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(stages, given).module()


@each_case
def test_stand_ins_can_be_exported(case: Case):
    name = "ring" if shape_of(case.module).kernel else "svd"  # a ring has the most parts: it moves a bond
    stages, _ = replaced(case, name)
    stages.eval()
    program = exported(stages, case.arguments())
    torch.testing.assert_close(program(*case.arguments()), stages(*case.arguments()))


@each_case
def test_a_stand_in_keeps_the_hooks_and_the_mode_of_its_layer(case: Case):
    module, seen = copy.deepcopy(case.module), []
    module.register_forward_pre_hook(lambda one, args: seen.append("before"))
    module.register_forward_hook(lambda one, args, output: seen.append("after"))
    wiring, ranks = wiring_of("svd", shape_of(module)), middle_ranks(case, "svd")
    for mode in (True, False):
        weights = stage_weights(module, wiring, fitted(case, "svd"))
        stages = factorised(module.train(mode), wiring, ranks, weights)
        assert all(one.training is mode for one in stages.modules())
        seen.clear()
        stages(*case.arguments())
        assert seen == ["before", "after"]


def test_a_stand_in_shares_the_bias_of_its_layer():
    for case in CASES:
        wiring = wiring_of("svd", shape_of(case.module))
        weights = stage_weights(case.module, wiring, fitted(case, "svd"))
        stages = factorised(case.module, wiring, middle_ranks(case, "svd"), weights)
        assert stages.bias is getattr(case.module, "bias", None)
