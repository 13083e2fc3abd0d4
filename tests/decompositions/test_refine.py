"""Fits in the metric: never worse than their start, exact where the best is known, sound where moments are singular."""

from __future__ import annotations

import pytest
import torch
from conformance.cases import CASES, NAMES, Case  # type: ignore[import-not-found]
from torch import nn

from rankfold import Budget, compress
from rankfold.calibration.moments import calibrate
from rankfold.decompositions import expand, fit, metric_error, reconstruct, wiring_of
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.network.finding import find_layers
from rankfold.network.kinds import shape_of, weight_of


def moment_of(case: Case, examples: int = 4) -> Moment:
    """Of correlated inputs that are not centred."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(case.module).eval()
    batches = [torch.randn(case.inputs, generator=generator).cumsum(-1) + 1 for _ in range(examples)]
    return calibrate(model, find_layers(model, batches[0]).found, batches).moments["0"]


SOME = ("linear", "conv2d-grouped", "transposed2d")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", [case for case in CASES if case.label in SOME], ids=lambda case: case.label)
def test_a_fit_in_the_metric_is_never_worse_there_than_one_without(case: Case, name: str):
    weight, shape, moment = weight_of(case.module), shape_of(case.module), moment_of(case)
    wiring = wiring_of(name, shape)
    part = 4 if name in ("cp", "cp3") else 2  # at half of its useful ranks a CP is all but exact
    ranks = [max(1, rank // part) for rank in expand(name, weight, shape).max_ranks()]
    for _ in ranks:
        ranks = [min(rank, most) for rank, most in zip(ranks, wiring.largest_ranks(shape, ranks), strict=True)]
    plain = fit(name, weight, shape, ranks)
    found = fit(name, weight, shape, ranks, moment=moment)
    assert [one.shape for one in found] == [one.shape for one in plain]
    exact = weight.double()
    assert metric_error(exact, wiring, found, moment) <= metric_error(exact, wiring, plain, moment) + 1e-15


@pytest.mark.parametrize("label", ["linear", "conv2d", "conv2d-grouped", "conv2d-pointwise"])
def test_the_matrix_form_is_the_whitened_singular_value_decomposition(label: str):
    case = next(case for case in CASES if case.label == label)
    weight, shape, moment = weight_of(case.module).double(), shape_of(case.module), moment_of(case, 12)
    for rank in (1, 2, 4):
        found = fit("svd", weight, shape, [rank], moment=moment)
        matrix, joint = weight.flatten(2), moment.joint
        values, vectors = torch.linalg.eigh(joint)
        root = vectors @ torch.diag_embed(values.clamp_min(0).sqrt()) @ vectors.mT
        singular = torch.linalg.svdvals(matrix @ root).square()
        best = float(singular[..., rank:].sum() / singular.sum())
        assert metric_error(weight, wiring_of("svd", shape), found, moment) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 20), (20, 12)])
def test_where_outputs_have_a_metric_it_is_the_singular_value_decomposition_between_both(outputs: int, inputs: int):
    """‖H^½ (W − Ŵ) Σ^½‖ is least, and so it is once more for some of the outputs and inputs."""
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    square, metric = (torch.cov(torch.randn(size, 3 * size).double())[None] for size in (inputs, outputs))
    moment = Moment(joint=square, positions=1000, outputs=metric)
    rows, columns = (torch.arange(0, size, 2)[None] for size in (outputs, inputs))
    some = moment.of_outputs(rows).of_inputs(columns, 1)
    narrow = nn.Linear(columns.numel(), rows.numel())
    for module, known in ((layer, moment), (narrow, some)):
        shape, weight = shape_of(module), weight_of(module).double()
        left, right = (torch.linalg.cholesky(one[0]) for one in (known.outputs, known.joint))
        values = torch.linalg.svdvals(left.T @ weight[0] @ right).square()
        found = fit("svd", weight, shape, (4,), moment=known)
        lost = weight[0] - reconstruct(wiring_of("svd", shape), found)[0]
        assert float((left.T @ lost @ right).square().sum()) == pytest.approx(float(values[4:].sum()), rel=1e-8)
        expected = float(values[4:].sum() / values.sum())
        assert metric_error(weight, wiring_of("svd", shape), found, known) == pytest.approx(expected, rel=1e-8)
        assert expand("svd", weight, shape, known).grids()[0].errors[3] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("name", ["svd", "spatial"])
def test_dead_channels_and_few_samples_do_no_harm(name: str):
    """One image, two of its channels always zero: a moment of low rank."""
    conv = nn.Conv2d(6, 8, 3)
    model, x = nn.Sequential(conv).eval(), torch.randn(1, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    x[:, :2] = 0
    moment = calibrate(model, find_layers(model, x).found, [x], shrink=False).moments["0"]
    values = torch.linalg.eigvalsh(moment.joint)[0]
    assert int((values > 1e-6 * values.max()).sum()) <= 9
    factors = fit(name, weight_of(conv), shape_of(conv), [6], moment=moment, steps=20)
    assert all(bool(factor.isfinite().all()) for factor in factors)
    nothing = Moment(torch.zeros_like(moment.joint), positions=9)
    assert metric_error(weight_of(conv).double(), wiring_of(name, shape_of(conv)), factors, nothing) == 0.0


@pytest.mark.parametrize(("name", "search"), [("svd", "rene"), ("cp3", "exact")])
def test_calibrated_compression_keeps_its_budget_and_comes_closer_to_the_outputs(
    name: str, search: str, small_cnn: nn.Module, image: torch.Tensor
):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(32, 3, 8, 8, generator=generator).cumsum(-1).cumsum(-2) / 4
    budget = Budget(macs=0.5)
    plain = compress(small_cnn, image, decomposition=name, budget=budget, search=search, calibration="none")
    found = compress(small_cnn, image, decomposition=name, budget=budget, search=search, calibration=[images])
    assert found.after.macs <= 0.5 * found.before.macs
    assert found.plan.settings["metric"] == "second moments"
    assert plain.plan.settings["metric"] == "frobenius"
    with torch.no_grad():
        target = small_cnn(images)
        losses = [float((result.model(images) - target).square().sum()) for result in (plain, found)]
    assert losses[1] < losses[0]


def test_the_identity_changes_nothing():
    conv = nn.Conv2d(6, 8, 3)
    plain = fit("tucker", weight_of(conv), shape_of(conv), [3, 4])
    same = fit("tucker", weight_of(conv), shape_of(conv), [3, 4], moment=IDENTITY)
    assert all(torch.equal(one, other) for one, other in zip(plain, same, strict=True))
