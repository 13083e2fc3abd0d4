"""Interpolative units through the whole flow: compressed, saved, loaded, fine-tuned, exported."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blocks import BLOCKS, Bottleneck, built, images  # type: ignore[import-not-found]
from torch import nn

from rankfold import Budget, BudgetError, PlanError, UnknownNameError, compress, load, save, study, units
from rankfold.calibration.asked import calibrated
from rankfold.calibration.walks import walking
from rankfold.evaluation import accuracy
from rankfold.network.finding import find_layers
from rankfold.network.passes import parted, run
from rankfold.plan import Plan
from rankfold.progress import silent
from rankfold.recovery import Attempt
from rankfold.search.network_objectives import divergences
from rankfold.search.prices import priced
from rankfold.sources.data import Dataset, Normalisation, open_dataset
from rankfold.training import Training, fine_tune


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).square().sum() / other.square().sum())


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("calibration", ["none", "given"])
def test_saved_and_loaded(name: str, calibration: str, tmp_path: Path) -> None:
    model, x = built(name)
    inputs = [x[:12], x[12:]] if calibration == "given" else "none"
    result = compress(model, x[:1], decomposition="interpolative", budget=Budget(macs=0.75), calibration=inputs)
    assert result.plan.narrowings
    save(result, tmp_path / "small")
    again = load(tmp_path / "small", BLOCKS[name][0]())
    assert torch.equal(again(x), result.model(x))
    assert Plan.from_json(result.plan.to_json()) == result.plan
    assert not any("Factorised" in type(module).__name__ for module in result.model.modules())


@pytest.mark.parametrize("name", ["swiglu", "geglu", "flattened", "transposed"])
def test_forward_order_helps(name: str) -> None:
    """Where no batch norm follows, whose variance is kept up at the price of a larger error; else it is taken back."""
    model, _ = built(name)
    x = BLOCKS[name][1](400)
    ordered, apart = (
        compress(
            model, x[:1], decomposition="interpolative", budget=Budget(macs=0.7), calibration=[x], sequential=sequential
        ).model
        for sequential in (True, False)
    )
    with torch.no_grad():
        assert distance(ordered(x), model(x)) <= 1.001 * distance(apart(x), model(x))


def test_inputs_tell_what_to_keep() -> None:
    """Channels that are copies of others cost nothing, and only calibration knows."""
    model, x = built("bottleneck")
    with torch.no_grad():
        for tensor in (model.reduce.weight, *model.first.parameters(), *model.first.buffers()):
            if tensor.ndim:
                tensor[8:] = tensor[:8]
        kept = compress(model, x[:1], decomposition="interpolative", budget=Budget(macs=0.8), calibration=[x])
        blind = compress(model, x[:1], decomposition="interpolative", budget=Budget(macs=0.8), calibration="none")
        assert distance(kept.model(x), model(x)) < 1e-3 < distance(blind.model(x), model(x))


@pytest.mark.parametrize("name", ["gate", "swiglu"])
def test_a_study_gives_what_compress_does(name: str) -> None:
    """Networks of several sizes made of one study are those made one by one."""
    model, x = built(name)
    studied = study(model, x[:1], decomposition=["svd", "interpolative"], budget=Budget(macs=0.8), calibration=[x])
    for budget in (Budget(macs=0.5), Budget(macs=0.8)):
        one, other = (
            studied.compress(budget),
            compress(model, x[:1], decomposition=["svd", "interpolative"], budget=budget, calibration=[x]),
        )
        assert one.plan == other.plan
        assert torch.equal(one.model(x), other.model(x))
    assert studied.compress().plan == studied.compress(Budget(macs=0.8)).plan


def test_channels_are_priced_on_two_inputs_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, however long their passes are."""
    model, _ = built("swiglu")
    x, seen = BLOCKS["swiglu"][1](64), []

    def noted(*args: Any, **options: Any) -> Any:
        seen.extend(len(batch) for batch in args[4])
        return priced(*args, **options)

    monkeypatch.setattr(units, "priced", noted)
    for most, sizes in ((2**43, [8]), (0, [1, 1])):
        monkeypatch.setattr(units, "WORK", most)
        study(model, x[:1], decomposition="interpolative", budget=Budget(macs=0.8), calibration=[x])
        assert seen == sizes
        seen.clear()


@pytest.mark.parametrize("other", [Budget(params=0.5), Budget(macs=0.5, params=0.5), Budget(error=0.1)])
def test_a_study_is_of_one_kind_of_budgets(other: Budget) -> None:
    model, x = built("bottleneck")
    studied = study(model, x[:1], decomposition="svd", budget=Budget(macs=0.8), calibration="none")
    with pytest.raises(BudgetError, match="the study is of budgets like .*make another one"):
        studied.compress(other)


def unread() -> Iterator[torch.Tensor]:
    """Inputs that nothing may read."""
    raise AssertionError
    yield


def least_params(model: nn.Module, x: torch.Tensor, decomposition: list[str]) -> int:
    """What the error says that is left at least, of a budget that is none."""
    with pytest.raises(BudgetError, match="include more layers") as caught:
        compress(model, x[:1], decomposition=decomposition, budget=Budget(params=1), calibration=unread())
    return int(str(caught.value).split(" at least params=")[1].split("(")[1].split(")")[0].replace(",", ""))


def test_what_no_plan_meets_is_said_before_inputs_are_read() -> None:
    """Of low rank alone it is known exactly."""
    model, x = built("bottleneck")
    least = least_params(model, x, ["svd"])
    result = compress(model, x[:1], decomposition="svd", budget=Budget(params=least), calibration=[x])
    assert result.after.params == least


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_said_to_be_too_little_is(name: str) -> None:
    """A plan with the fewest parameters that there can be has no fewer than the error says are left."""
    model, x = built(name)
    least = least_params(model, x, ["svd", "interpolative"])
    with pytest.raises(BudgetError, match="smallest feasible one is params=") as caught:
        compress(
            model, x[:1], decomposition=["svd", "interpolative"], budget=Budget(params=max(least, 1)), calibration=[x]
        )
    assert int(str(caught.value).split("(")[2].split(")")[0].replace(",", "")) > least


def test_deterministic() -> None:
    model, x = built("gate")
    first, second = (
        compress(model, x[:1], decomposition=["svd", "interpolative"], budget=Budget(macs=0.6), calibration=[x])
        for _ in range(2)
    )
    assert first.plan == second.plan
    assert torch.equal(first.model(x), second.model(x))


def test_a_plan_for_channels_that_are_not_there(tmp_path: Path) -> None:
    model, x = built("bottleneck")
    result = compress(model, x[:1], decomposition="interpolative", budget=Budget(macs=0.7), calibration="none")
    (first, *others) = result.plan.narrowings
    wrong = dataclasses.replace(first, kept=(*first.kept[:-1], 99))
    plan = dataclasses.replace(result.plan, narrowings=(wrong, *others))
    save(result.model, plan, tmp_path / "wrong")
    with pytest.raises(PlanError, match="keeps channel 99 of 16"):
        load(tmp_path / "wrong", Bottleneck())
    with pytest.raises(PlanError, match="the plan keeps it"):
        save(model, result.plan, tmp_path / "other")


def test_unknown_decompositions_name_it() -> None:
    model, x = built("bottleneck")
    with pytest.raises(UnknownNameError, match="interpolative"):
        compress(model, x[:1], decomposition="interpolativ", budget=Budget(macs=0.7))


def test_widths_with_ranks_inside_are_trained(tmp_path: Path) -> None:
    """Narrow layers and factors of narrow layers are trained, with scaled gradients, and keep their plan."""
    model, x = built("bottleneck")
    result = compress(model, x[:1], decomposition=["cp3", "interpolative"], budget=Budget(macs=0.5), calibration=[x])
    labels = model(images(256)).argmax(1).numpy()
    data = Dataset(images(256).numpy(), labels, (3, 8, 8), Normalisation((0.0,), (1.0,)))
    assert any(layer.narrowed and layer.decomposition for layer in result.plan.layers)
    training = Training(epochs=6, batch_size=32, precision="no")
    trained = fine_tune(result.model, data, teacher=model, plan=result.plan, training=training)
    assert trained.epochs[-1].loss < 0.9 * trained.epochs[0].loss
    save(trained.model, result.plan, tmp_path / "trained")
    assert torch.equal(load(tmp_path / "trained", Bottleneck())(x), trained.model.eval()(x))


@pytest.mark.parametrize("outputs", [8, 1])
def test_fits_are_taken_back_where_they_harm(outputs: int) -> None:
    """They do where outputs are farther from the original's than before."""
    batches = [torch.randn(50, 6) for _ in range(2)]
    model = nn.Linear(6, outputs)

    def shaken(by: float) -> nn.Linear:
        other = nn.Linear(6, outputs)
        with torch.no_grad():
            other.weight.copy_(model.weight + by * torch.randn(outputs, 6))
            other.bias.copy_(model.bias)
        return other

    for before, after, farther in ((0.3, 0.0, False), (0.0, 0.01, True), (0.01, 3.0, True)):
        student = shaken(before)
        weight = student.weight.detach().clone()
        attempt = Attempt(student, model, batches)
        student.load_state_dict(shaken(after).state_dict())
        assert attempt.taken_back() == farther
        assert torch.equal(student.weight, weight) == farther


def test_tied_tensors_and_outputs_that_cannot_be_compared_are_no_obstacle() -> None:
    """Tensors that are one are kept once; where nothing tells whether outputs are farther, nothing is taken back."""
    student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    student[1].weight = student[0].weight
    attempt = Attempt(student, nn.Linear(4, 3), [torch.randn(2, 4)])
    assert not attempt.taken_back()
    before, attempt = student[1].weight.detach().clone(), Attempt(student, copy.deepcopy(student), [torch.randn(8, 4)])
    with torch.no_grad():
        student[0].weight += 1
    assert attempt.taken_back()
    assert torch.equal(student[1].weight, before)


@pytest.mark.parametrize("closer", ["as it was", "as it is"])
def test_a_part_begins_as_it_was_only_where_it_is_closer_so(closer: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).eval(), torch.randn(8, 4)
    student = copy.deepcopy(model)

    def shake_() -> None:
        with torch.no_grad():
            for tensor in (*student.parameters(), student[1].running_mean):
                tensor += 1

    if closer == "as it is":
        shake_()
    attempt = Attempt(student, model, [x])
    if closer == "as it was":
        shake_()
    else:
        student.load_state_dict(model.state_dict())
    last = student[2].weight.clone()
    part, whole = student[:2], model[:2]
    with torch.no_grad():
        attempt.chosen_([*part.parameters(), *part.buffers()], lambda: float((part(x) - whole(x)).square().sum()))
    assert all(torch.equal(part.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
    assert torch.equal(student[2].weight, last)


@pytest.mark.parametrize(("shape", "rows"), [((6, 700, 3), 3 * 700), ((6, 3), 6), ((6, 3, 40, 40), 6 * 1600)])
def test_of_texts_some_tokens_are_enough_to_compare(shape: tuple[int, ...], rows: int) -> None:
    """Every token is a row, and whole examples are taken; of images, or places in them, all count."""
    model, axis = nn.Identity(), 1 if len(shape) > 3 else -1
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = divergences(model, nn.ReLU(), list(x.split(1)), 1.0)
    assert len(found) == rows
    one, other = (torch.log_softmax(given.movedim(axis, -1).flatten(0, -2), -1) for given in (x, x.relu()))
    whole = ((one - other) * one.exp()).sum(-1)
    torch.testing.assert_close(found, whole[:rows].double(), rtol=1e-3, atol=1e-5)


def test_inputs_are_held_back_in_part() -> None:
    """The last examples of all batches, a batch cut in two where they end in it; none of too few."""
    batches = [{"x": torch.arange(k, k + 5)} for k in (0, 5, 10)]
    kept, held = parted(batches, 2, 7)
    assert torch.equal(torch.cat([one["x"] for one in kept]), torch.arange(8))
    assert [one["x"].tolist() for one in held] == [[8, 9], [10, 11, 12, 13, 14]]
    assert parted(batches[:1], 6, 7) == (batches[:1], [])


@pytest.mark.parametrize(("tokens", "held"), [(1024, 4), (64, 8)])
def test_of_texts_no_more_is_held_back_than_is_compared(tokens: int, held: int) -> None:
    """An eighth, or blocks that hold a few thousand rows of outputs; what is not held back is learned from."""
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
    rows = torch.randint(16, (64, tokens), generator=torch.Generator().manual_seed(0))
    layers = find_layers(model, rows[:1])
    known = calibrated(model, layers, rows[:1], [rows], samples=None, of_weights=False, progress=silent)
    assert sum(map(len, known.held)) == held
    assert known.samples == len(rows) - held


def test_passes_wait_and_go_on() -> None:
    """A pass stopped at every layer gives what it gives without, sees changes made meanwhile, and draws as alone."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x) + torch.rand(4))

    model, batches, given = Noisy(), [torch.randn(2, 4) for _ in range(3)], []
    expected = [run(model, batch) for batch in batches]
    stops = {model.first: 0, model.second: 1}
    state = torch.get_rng_state()
    with walking(model, stops, lambda batch, _: given.append(run(model, batch)), batches, outputs=False) as walks:
        for walk, batch in zip(walks, batches, strict=True):
            assert torch.equal(walk.to(0), batch)
        seen = [walk.to(1) for walk in walks]
        assert all(one is not None for one in seen)
        for walk in walks:
            assert walk.to(2) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))


def test_a_pass_that_fails_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    batches = [torch.randn(2, 5)]
    walks = walking(model, {model[1]: 0}, lambda batch, _: run(model, batch), batches, outputs=True)
    with walks as (walk,), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        walk.to(0)


def test_mobilenet_loses_little(data: Path) -> None:
    """A twelfth of the MACs of a real network, on 48 unlabelled images, without training."""
    from rankfold.sources import zoo
    from rankfold.sources.models import load_weights_

    model = zoo.build("mobilenet_v2")
    load_weights_(model, data / "weights" / "imagenet_mobilenet_v2.safetensors")
    normal = Normalisation(zoo.IMAGENET_MEAN, zoo.IMAGENET_STD)
    known = open_dataset(f"npz:{data / 'imagenet_val' / 'calibration.npz'}", (3, 224, 224), normal).sample(48)
    tested = open_dataset(f"npz:{data / 'imagenet_sample' / 'images.npz'}", (3, 224, 224), normal).sample(100)
    batches = [known.batch(start, start + 12)[0] for start in range(0, 48, 12)]
    result = compress(
        model, torch.zeros(1, 3, 224, 224), decomposition="interpolative", budget=Budget(macs=0.92), calibration=batches
    )
    assert result.after.macs <= 0.92 * result.before.macs
    assert accuracy(result.model, tested).top1 >= accuracy(model, tested).top1 - 6
    assert np.isfinite([one.predicted_error for one in result.plan.narrowings]).all()
