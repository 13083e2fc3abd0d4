"""The continuous search: its relaxation, its budget, its objectives, its history, and that it survives being killed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankfold import ArtifactError, Budget, BudgetError, DataError, SearchError, compress
from rankfold.decompositions import expand, reconstruct
from rankfold.decompositions.metric import Moment
from rankfold.network.costs import cost_of
from rankfold.network.finding import find_layers
from rankfold.network.kinds import module_weight, weight_of
from rankfold.objectives import Divergence, Validation
from rankfold.planning import assign, measure, pose
from rankfold.search import SEARCHES, Problem, Reconstruction, Rene
from rankfold.search.candidates import measure_layer
from rankfold.search.objective import inner
from rankfold.search.relaxation import entropy, relax
from rankfold.search.rounding import polished
from rankfold.search.settle import settle


def problem_of(model: nn.Module, image: torch.Tensor, decomposition: str, **budget: float) -> Problem:
    limits = Budget(**budget)
    choices, layers = assign(find_layers(model, image), decomposition)
    curves = measure(model, layers, choices, units=limits.units)
    return pose(curves, cost_of(model, image), limits)


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(2)]


@pytest.fixture
def trained_cnn(small_cnn: nn.Module) -> nn.Module:
    """Layers of very different importance, so that ranks matter."""
    with torch.no_grad():
        small_cnn[2].weight.mul_(torch.linspace(3, 0, 24)[:, None, None, None])
        small_cnn[5].weight.mul_(4)
    return small_cnn


@given(temperature=st.floats(1e-4, 1.0), fraction=st.floats(0.3, 0.9))
def test_relaxed_distributions_keep_the_budget_on_average_and_are_stationary(temperature: float, fraction: float):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 3)).eval()
    problem = problem_of(model, torch.zeros(1, 4, 9, 9), "spatial", macs=fraction)
    prices = [problem.values(curve) for curve in problem.curves]
    distributions = relax(problem, prices, temperature).distributions
    expected = sum(float(p @ curve.costs["macs"]) for p, curve in zip(distributions, problem.curves, strict=True))
    assert expected <= problem.room("macs") * (1 + 1e-5)
    multipliers = []
    for p, price, curve in zip(distributions, prices, problem.curves, strict=True):
        assert p.sum() == pytest.approx(1)
        held = p > 1e-12  # log p + (v + μ c) / τ is one constant where p lives
        costs = curve.costs["macs"][held].astype(float)
        if len(costs) > 1 and np.ptp(costs):
            level = temperature * np.log(p[held]) + price[held]
            slope, offset = np.polyfit(costs, level, 1)
            assert np.allclose(level, slope * costs + offset, atol=1e-6)
            multipliers.append(-slope)
    assert np.allclose(multipliers, multipliers[0], rtol=1e-3, atol=1e-9)
    assert multipliers[0] >= -1e-9


@pytest.mark.parametrize("name", ["svd", "spatial"])
def test_a_blend_of_nested_candidates_is_a_mask_and_lies_below_the_rank_of_its_cost(name: str):
    """Why the expected error is minimised: the blend's error is Σ σ² (1 − c)², least where nothing is 0 or 1."""
    torch.manual_seed(2)
    weight = torch.randn(1, 8, 6, 3, 3, dtype=torch.float64)
    from rankfold.decompositions.wiring import LayerShape
    from rankfold.plan import LayerSpec

    shape = LayerShape(8, 6, (3, 3))
    expansion = expand(name, weight, shape)
    (most,) = expansion.max_ranks()
    p = torch.rand(most, dtype=torch.float64).softmax(0)
    blend = sum(p[r - 1] * reconstruct(expansion.wiring, expansion.factors([r])) for r in range(1, most + 1))
    (grid,) = expansion.grids()
    energies = -np.diff(np.append(1.0, grid.errors))
    mask = np.cumsum(p.numpy()[::-1])[::-1]
    error = float((weight - blend).square().sum() / weight.square().sum())
    assert error == pytest.approx(float(energies @ (1 - mask) ** 2))
    rank = most // 2
    soft = np.clip(1 - 0.5 * energies[rank] / energies, 0, 1)  # soft thresholding, then scaled to the rank's cost
    soft = soft / soft.sum() * rank
    spec = LayerSpec("conv", "Conv2d", shape, "float64", 8, (8, 6, 3, 3))
    assert len(measure_layer(spec, weight, (name,), units=("params",))) > 2
    if soft.max() <= 1:
        assert energies @ (1 - soft) ** 2 < grid.errors[rank - 1]


@pytest.mark.parametrize(
    ("decomposition", "fraction"),
    [*((name, 0.7) for name in ("svd", "tucker", "cp3")), *((name, 0.4) for name in ("spatial", "tt", "auto"))],
)
def test_separable_search_is_within_half_a_percent_of_the_bound_and_uses_its_budget(
    decomposition: str, fraction: float
):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), *(nn.Conv2d(16, 16, 3) for _ in range(4)), nn.Conv2d(16, 24, 3, stride=2)]
    problem = problem_of(nn.Sequential(*layers).eval(), torch.zeros(1, 3, 20, 20), decomposition, macs=fraction)
    found = Rene()(problem)
    settled = replace(problem, curves=found.curves)
    reference = SEARCHES["exact"](settled)
    assert settled.fits(found.choices)
    assert found.objective <= reference.bound * 1.005
    assert settled.used(found.choices, "macs") >= 0.99 * settled.used(reference.choices, "macs")
    assert all(curve.settled(k) for curve, k in zip(found.curves, found.choices, strict=True))


def test_a_layer_with_very_many_ranks_fills_the_budget():
    """Ranks so far from the present one that their probability is zero are still told apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(800, 500), nn.Linear(500, 10)).eval()
    example = torch.zeros(1, 800)
    for fraction in (0.3, 0.1):
        problem = problem_of(model, example, "svd", params=fraction)
        cheapest = [int(problem.pressure(curve).argmin()) for curve in problem.curves]
        prices = [problem.pressure(curve) for curve in problem.curves]  # that lead the wrong way
        assert problem.objective(polished(problem, cheapest, prices)) == SEARCHES["exact"](problem).objective
        found = Rene()(problem)
        best = SEARCHES["exact"](problem)
        assert found.objective <= best.bound * 1.005
        assert problem.used(found.choices, "params") >= 0.99 * problem.used(best.choices, "params")


def test_only_candidates_that_the_stages_visit_are_fitted(small_cnn: nn.Module, image: torch.Tensor):
    problem = problem_of(small_cnn, image, "cp3", macs=0.6)
    found = Rene()(problem)
    stages = 1 + max(step.stage for step in found.trace.steps)
    assert stages > 1
    for before, after in zip(problem.curves, found.curves, strict=True):
        added = sum(len(known) for known in after.fits.values()) - sum(len(known) for known in before.fits.values())
        assert added <= stages - 1


def test_a_limited_error_is_met_by_the_smallest_fitted_rank(small_cnn: nn.Module, image: torch.Tensor):
    problem = problem_of(small_cnn, image, "cp3", error=0.2)
    found = settle(problem, SEARCHES["exact"])
    assert replace(problem, curves=found.curves).fits(found.choices)
    for curve, k in zip(found.curves, found.choices, strict=True):
        cheaper = [j for j in range(len(curve)) if curve.costs["macs"][j] < curve.costs["macs"][k]]
        if curve.methods[k] and cheaper:
            assert curve.settled(max(cheaper, key=lambda j: curve.costs["macs"][j]))


def test_a_limited_error_holds_when_refinement_is_cut_short(
    small_cnn: nn.Module, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.modules["rankfold.search.settle"], "ROUNDS", 1)
    problem = problem_of(small_cnn, image, "cp", error=0.15)
    found = settle(problem, SEARCHES["greedy"])
    assert all(curve.settled(k) for curve in found.curves for k in range(len(curve)))
    assert replace(problem, curves=found.curves).fits(found.choices)


def test_stages_come_to_an_end(
    small_cnn: nn.Module, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(sys.modules["rankfold.search.rene"], "STAGES", 1)
    problem = problem_of(small_cnn, image, "cp3", macs=0.6)
    found = Rene(checkpoint=tmp_path / "search.json")(problem)
    assert all(curve.settled(k) for curve in found.curves for k in range(len(curve)))
    assert Rene(checkpoint=tmp_path / "search.json")(problem).choices == found.choices


def test_history_cools_to_one_candidate_per_layer(small_cnn: nn.Module, image: torch.Tensor):
    result = compress(
        small_cnn, image, decomposition="tucker", budget=Budget(macs=0.5), search="rene", calibration="none"
    )
    steps = result.trace.steps
    assert list(result.trace.layers) == [layer.name for layer in result.plan.layers]
    assert sum(steps[0].entropy) > 10 * sum(steps[-1].entropy)
    assert steps[-1].costs["macs"] == pytest.approx(result.before.macs * 0.5, rel=0.05)
    assert steps[0].temperature > steps[-1].temperature
    assert all(len(step.likeliest) == len(result.plan.layers) for step in steps)
    assert entropy(np.array([0.5, 0.5, 0.0])) == pytest.approx(np.log(2))


def test_divergence_is_zero_at_the_teacher_and_sees_every_layer_kind():
    from conformance.cases import BATCHED  # type: ignore[import-not-found]

    for case in BATCHED:
        model = nn.Sequential(case.module).eval()
        inputs = torch.randn(case.inputs, generator=torch.Generator().manual_seed(0))
        found = find_layers(model, inputs).found
        curves = [measure_layer(layer, weight_of(case.module), ("svd",)) for layer in found]
        weights = [weight_of(case.module) for _ in found]
        assert torch.equal(module_weight(found[0], weights[0]), case.module.weight)
        objective = Divergence(model, [inputs], logits=False)
        loss, (slope,) = objective.gradient(curves, weights, 0)
        assert loss == pytest.approx(0, abs=1e-10)
        moved = weights[0] * 1.1
        loss, (slope,) = objective.gradient(curves, [moved], 0)
        nudge = 1e-3 * torch.randn(moved.shape, generator=torch.Generator().manual_seed(1))
        up = objective.loss(curves, [moved + nudge], 0)
        down = objective.loss(curves, [moved - nudge], 0)
        assert up - down == pytest.approx(2 * inner(slope, nudge), rel=0.1, abs=1e-6)
        assert case.module.weight.grad is None


@pytest.mark.parametrize("together", [True, False])
def test_descent_on_the_divergence_ends_no_higher_than_the_separable_plan(
    together: bool, trained_cnn: nn.Module, image: torch.Tensor, batches: list[torch.Tensor]
):
    objective = Divergence(trained_cnn, batches, together=together)
    budget = Budget(macs=0.35)
    separable = compress(trained_cnn, image, decomposition="spatial", budget=budget, search="rene", calibration="none")
    trained_cnn.train()
    before = [parameter.clone() for parameter in trained_cnn.parameters()]
    found = compress(
        trained_cnn,
        image,
        decomposition="spatial",
        budget=budget,
        search=Rene(objective=objective, turns=8),
        calibration="none",
    )
    assert trained_cnn.training
    assert all(torch.equal(old, new) for old, new in zip(before, trained_cnn.parameters(), strict=True))
    assert found.after.macs <= 0.35 * found.before.macs
    losses = [step.losses["objective"] for step in found.trace.steps if "objective" in step.losses]
    if together:
        trained_cnn.eval()
        reached = [divergence(trained_cnn, result.model.eval(), batches) for result in (separable, found)]
        assert reached[1] < reached[0]
        assert losses == sorted(losses, reverse=True)


def divergence(teacher: nn.Module, student: nn.Module, batches: list[torch.Tensor]) -> float:
    with torch.no_grad():
        return sum(
            float(nn.functional.kl_div(student(x).log_softmax(1), teacher(x).softmax(1), reduction="batchmean"))
            for x in batches
        )


def test_validation_takes_the_users_loss_and_batches_of_any_form(small_cnn: nn.Module, image: torch.Tensor):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_cnn

        def forward(self, pixels: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
            return {"scores": scale * self.body(pixels)}

    labelled = [({"pixels": torch.randn(4, 3, 8, 8), "scale": 2.0}, torch.arange(4)) for _ in range(2)]
    objective = Validation(
        Named(), labelled, loss=lambda out, target: nn.functional.cross_entropy(out["scores"], target)
    )
    result = compress(
        Named(),
        {"pixels": image},
        decomposition="svd",
        budget=Budget(params=0.5),
        search=Rene(objective=objective, turns=2),
        calibration="none",
    )
    assert result.after.params <= 0.5 * result.before.params
    assert "validation loss" in result.plan.settings["search"]
    with pytest.raises(DataError, match="one number"):
        Validation(small_cnn, [(image, torch.zeros(1).long())], loss=lambda out, target: out).gradient([], [], 0)
    with pytest.raises(DataError, match="no batches"):
        Divergence(small_cnn, [])


def test_a_metric_weighs_directions(small_cnn: nn.Module, image: torch.Tensor):
    problem = problem_of(small_cnn, image, "svd", macs=0.5)
    weights = [0.5 * curve.weight for curve in problem.curves]
    plain, _ = Reconstruction().gradient(problem.curves, weights, 0)
    assert plain == pytest.approx(0.25 * len(weights), rel=1e-5)
    n = weights[0].flatten(2).shape[-1]
    moment = torch.diag(torch.linspace(0, 2, n, dtype=torch.float64))[None]
    metric = Reconstruction({problem.curves[0].layer.name: Moment(moment, positions=100)})
    assert not metric.separable
    loss, slopes = metric.gradient(problem.curves, weights, 0)
    assert loss == pytest.approx(plain, rel=1e-5)  # half the weight everywhere is a quarter of the error in any metric
    assert torch.all(slopes[0].flatten(2)[..., 0] == 0)  # the first direction never occurs
    found = Rene(objective=metric, turns=4)(problem)
    assert replace(problem, curves=found.curves).fits(found.choices)


def test_what_is_not_finite_stops_the_search(small_cnn: nn.Module, image: torch.Tensor):
    poisoned = Divergence(small_cnn, [torch.full((2, 3, 8, 8), torch.nan)])
    with pytest.raises(SearchError, match="not finite"):
        compress(
            small_cnn,
            image,
            decomposition="svd",
            budget=Budget(macs=0.5),
            search=Rene(objective=poisoned),
            calibration="none",
        )
    with pytest.raises(BudgetError, match="reconstruction objective"):
        compress(
            small_cnn,
            image,
            decomposition="svd",
            budget=Budget(error=0.1),
            search=Rene(objective=Divergence(small_cnn, [image])),
            calibration="none",
        )


class KilledError(Exception):
    pass


def killed_after(steps: int):
    seen = 0

    def report(what: str, done: int, total: int, note: str = "", /) -> None:
        nonlocal seen
        seen += what == "searching ranks" and "stage" in note
        if seen > steps:
            raise KilledError

    return report


@pytest.mark.parametrize(("objective", "steps"), [("reconstruction", 3), ("reconstruction", 20), ("divergence", 17)])
def test_killed_and_resumed_it_finds_the_same_plan(
    steps: int, objective: str, trained_cnn: nn.Module, image: torch.Tensor, batches: list[torch.Tensor], tmp_path: Path
):
    path = tmp_path / "search.json"

    def rene(checkpoint: Path | None) -> Rene:
        chosen = Reconstruction() if objective == "reconstruction" else Divergence(trained_cnn, batches)
        return Rene(objective=chosen, turns=6, checkpoint=checkpoint)

    problem = problem_of(trained_cnn, image, "cp3", macs=0.4)
    whole = rene(None)(problem)
    with pytest.raises(KilledError):
        rene(path)(problem, killed_after(steps))
    resumed = rene(path)(problem)
    assert resumed.choices == whole.choices
    assert resumed.objective == whole.objective
    assert resumed.trace.steps[-1] == whole.trace.steps[-1]
    again = rene(path)(problem)  # a finished search is not repeated
    assert again.choices == whole.choices
    if path.exists():
        with pytest.raises(ArtifactError, match="another search"):
            rene(path)(problem_of(trained_cnn, image, "cp3", macs=0.5))
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="not the checkpoint"):
        rene(path)(problem)
