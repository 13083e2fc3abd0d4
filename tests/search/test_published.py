"""The method as published: its schedule, its losses, and the ways it can go wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conformance.cases import BATCHED, NAMES, Case  # type: ignore[import-not-found]
from test_rene import KilledError, killed_after, problem_of
from torch import nn

from rankfold import Budget, BudgetError, SearchError, compress
from rankfold.objectives import Validation
from rankfold.search.published import CIFAR, IMAGENET, Published, Schedule

TINY = Schedule(2, 10, 4, 4)


def quick(**changes: object) -> Published:
    return Published(**{"schedule": TINY, "warmup": 2, "iterations": 4, "clip": 5.0, **changes})  # type: ignore[arg-type]


def test_the_published_example_of_the_schedule():
    schedule = Schedule(100, 800, 100, 10)
    assert schedule.first() == (100, 200, 300, 400, 500, 600, 700, 800)
    assert schedule.refined(200, 1) == tuple(range(150, 251, 10))
    assert schedule.refined(240, 2) == tuple(range(235, 246))
    assert [schedule.step_after(stage) for stage in range(4)] == [100, 10, 1, 0]


def test_the_presets_take_two_and_three_stages():
    assert CIFAR.first() == tuple(range(10, 101, 10))
    assert [CIFAR.step_after(stage) for stage in range(3)] == [10, 1, 0]
    assert IMAGENET.first() == tuple(range(50, 851, 100))
    assert [IMAGENET.step_after(stage) for stage in range(4)] == [100, 10, 1, 0]


def test_losses_are_those_of_equations_five_to_seven(small_cnn: nn.Module, image: torch.Tensor):
    """The first weight loss, by hand, from factors and uniform logits."""
    from rankfold.decompositions import fit, reconstruct, wiring_of

    problem = problem_of(small_cnn, image, "tucker", macs=1.0)
    trace = quick(spread=0.0, warmup=0, iterations=1)(problem).trace
    total, means = 0.0, []
    for curve in problem.curves:
        shape, weight = curve.layer.shape, curve.weight
        wiring = wiring_of("tucker", shape)
        largest = min(shape.inputs, shape.outputs)
        ranks = sorted({min(rank, largest) for rank in TINY.first()})
        bonds = len(wiring.bonds)
        mixed = sum(reconstruct(wiring, fit("tucker", weight, shape, (rank,) * bonds)) for rank in ranks) / len(ranks)
        total += float((weight - mixed).square().sum())
        means.append(np.mean(ranks) / max(ranks))
    expected = total * 0.4 * np.sum(np.array(means) ** 0.8)
    assert trace.steps[0].losses["weights"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", BATCHED, ids=lambda case: case.label)
def test_it_runs_on_every_layer_kind_and_decomposition(case: Case, name: str):
    model = nn.Sequential(case.module, nn.Flatten()).eval()
    inputs = torch.randn(case.inputs, generator=torch.Generator().manual_seed(0))
    try:
        problem = problem_of(model, inputs, name, macs=1.0)
    except BudgetError:
        return
    if not problem.curves:
        return
    found = quick(iterations=2)(problem)
    last = found.trace.steps[-1]
    assert len(found.choices) == len(problem.curves)
    assert all(0 <= value <= np.log(5) + 1e-6 for value in last.entropy)
    for curve in found.curves:
        assert curve.costs["macs"][found.choices[0]] <= curve.layer.dense.macs


@pytest.mark.parametrize("changes", [{}, {"nested": True}, {"alternate": False}])
def test_same_seed_same_ranks_and_the_weight_loss_falls(changes: dict, small_cnn: nn.Module, image: torch.Tensor):
    problem = problem_of(small_cnn, image, "cp3", macs=1.0)
    runs = [quick(warmup=10, iterations=10, rate=1e-3, **changes)(problem) for _ in range(2)]
    assert runs[0].choices == runs[1].choices
    assert runs[0].trace == runs[1].trace
    losses = [step.losses["weights"] for step in runs[0].trace.steps if step.stage == 0]
    assert losses[-1] < losses[0]


def test_rank_steps_can_follow_a_validation_loss(small_cnn: nn.Module, image: torch.Tensor):
    labelled = [(torch.randn(4, 3, 8, 8), torch.arange(4))]
    objective = Validation(small_cnn, labelled, together=False)
    result = compress(
        small_cnn,
        image,
        decomposition="tucker",
        budget=Budget(macs=1.0),
        search=quick(objective=objective),
        calibration="none",
    )
    assert any("ranks" in step.losses for step in result.trace.steps)


def test_a_diverging_search_names_the_layer(small_cnn: nn.Module, image: torch.Tensor):
    problem = problem_of(small_cnn, image, "cp3", macs=1.0)
    with pytest.raises(SearchError, match=r"^0: factors are not finite in stage 1, iteration \d+ .* clip"):
        quick(rate=1e12, clip=None, warmup=50)(problem)


def test_it_knows_no_budget(small_cnn: nn.Module, image: torch.Tensor):
    with pytest.raises(BudgetError, match="knows no budget; it found a plan of macs="):
        compress(small_cnn, image, decomposition="tucker", budget=Budget(macs=0.05), search=quick(), calibration="none")
    with pytest.raises(BudgetError, match="one decomposition"):
        compress(small_cnn, image, decomposition="auto", budget=Budget(macs=1.0), search=quick(), calibration="none")


@pytest.mark.parametrize("steps", [4, 9])
def test_killed_and_resumed_it_finds_the_same_ranks(
    steps: int, small_cnn: nn.Module, image: torch.Tensor, tmp_path: Path
):
    problem = problem_of(small_cnn, image, "tucker", macs=1.0)
    path = tmp_path / "search.json"
    whole = quick(every=1)(problem)
    with pytest.raises(KilledError):
        quick(every=1, checkpoint=path)(problem, killed_after(steps))
    resumed = quick(every=1, checkpoint=path)(problem)
    assert resumed.choices == whole.choices
    assert resumed.trace == whole.trace
