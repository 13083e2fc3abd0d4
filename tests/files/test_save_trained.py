"""Models saved after training of the user's own, and the state of modules that is no tensor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Tied
from torch import nn

from rankfold import ArtifactError, Budget, PlanError, Result, compress, load, load_plan, save
from rankfold.files.artifact import load_metrics, plan_of

X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


class Counted(nn.Linear):
    """A layer that keeps something beside its tensors."""

    def __init__(self, size: int, extra: Any) -> None:
        super().__init__(size, size)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class Ungrateful(Counted):
    """One that does not take back what it gives."""

    def set_extra_state(self, state: Any) -> None:
        raise RuntimeError("no,\nthanks")


def skeleton(extra: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), extra or nn.Linear(12, 12))


def compressed(extra: nn.Module | None = None) -> Result:
    budget, settings = Budget(params=0.8), {"decomposition": "svd", "calibration": "none"}
    return compress(skeleton(extra), X, budget=budget, **settings)


@pytest.fixture
def result() -> Result:
    return compressed()


def train_(model: nn.Module) -> None:
    """A few steps of a loop that knows nothing of plans."""
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(X).square().mean().backward()
        optimiser.step()
    model.eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(one(X), other(X))


def test_a_loaded_model_is_trained_saved_and_loaded_bit_equal(result: Result, tmp_path: Path):
    save(result, tmp_path / "small", source={"model": "mine"})
    model = load(tmp_path / "small", skeleton())
    assert plan_of(model) == load_plan(tmp_path / "small")
    train_(model)
    assert not same(model, result.model)
    saved = save(model, tmp_path / "tuned", metrics={"top1": 91.2})
    again = load(saved, skeleton())
    assert same(again, model)
    assert plan_of(again).layers == result.plan.layers
    assert plan_of(again).source["model"] == "mine"  # still where the original is from
    assert load_metrics(saved)["top1"] == 91.2
    train_(again)
    save(again, tmp_path / "small")  # in place of what it was loaded from
    assert same(load(tmp_path / "small", skeleton()), again)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["small", "tuned"]


def test_a_compressed_model_is_trained_and_saved_with_its_plan(result: Result, tmp_path: Path):
    train_(result.model)
    path = save(result.model, result.plan, tmp_path / "a", source={"model": "mine"}, metrics={"note": "kept"})
    assert same(load(path, skeleton()), result.model)
    assert load_plan(path).source["model"] == "mine"
    assert load_metrics(path)["note"] == "kept"
    assert same(load(save(result.model, plan=result.plan, directory=tmp_path / "b"), skeleton()), result.model)
    assert same(load(save(result, directory=tmp_path / "c"), skeleton()), result.model)


def test_a_model_that_knows_no_plan_says_so(tmp_path: Path):
    for call in (plan_of, lambda model: save(model, tmp_path / "out")):
        with pytest.raises(PlanError, match="knows no plan, as those from rankfold.load do") as caught:
            call(skeleton())
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_arguments_that_are_mixed_up_are_told_apart(result: Result, tmp_path: Path):
    model, plan, out = result.model, result.plan, tmp_path / "out"
    for given, message in (
        ((result, plan, out), "a result has its plan"),
        ((plan, model, out), r"save was given \(Plan, Sequential, PosixPath\); it takes save\(result, directory\)"),
        ((model, out, plan), r"\(Sequential, PosixPath, Plan\)"),
        ((model, plan), r"\(Sequential, Plan\)"),
        ((result,), r"\(Result\)"),
        (("x", out), r"\(str, PosixPath\)"),
    ):
        with pytest.raises(ArtifactError, match=message):
            save(*given)
    assert not out.exists()


def test_a_plan_that_is_not_the_models_is_refused(result: Result, tmp_path: Path):
    plan, out = result.plan, tmp_path / "out"
    first = plan.decomposed[0]
    others = [layer for layer in plan.layers if layer != first]
    rank = first.ranks[0]
    larger = replace(
        first, ranks=(rank + 1,), after=replace(first.after, params=first.after.params * (rank + 1) // rank)
    )
    kept = replace(first, decomposition=None, ranks=(), after=first.before)
    for wrong, model, message in (
        (plan, skeleton(), rf"{first.name}: the plan makes it svd, the model has the whole weight \(12, 12\) there"),
        (plan.with_layers((larger, *others)), result.model, rf"the plan makes it svd of ranks {rank + 1}, "),
        (plan.with_layers((kept, *others)), result.model, rf"keeps it, with weight \(12, 12\), the model has no {first.name}.weight"),
        (plan.with_layers((replace(first, name="nine"),)), result.model, "nine: the plan makes it svd, the model has no nine.0.weight"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=message) as caught:
            save(model, wrong, out)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_wrappers_are_taken_off(result: Result, tmp_path: Path):
    save(result, tmp_path / "small")
    model = load(tmp_path / "small", skeleton())
    expected = set(model.state_dict())
    for k, wrapped in enumerate((nn.DataParallel(model), torch.compile(model), nn.DataParallel(torch.compile(model)))):
        assert plan_of(wrapped) is plan_of(model)
        for path in (save(wrapped, tmp_path / f"known{k}"), save(wrapped, result.plan, tmp_path / f"given{k}")):
            again = load(path, skeleton())
            assert set(again.state_dict()) == expected
            assert same(again, model)
    model[4] = torch.compile(model[4])
    assert set(load(save(model, tmp_path / "inside"), skeleton()).state_dict()) == expected


def test_tied_weights_of_a_trained_model_come_back(tmp_path: Path):
    torch.manual_seed(0)
    tokens = torch.arange(6)[None]
    result = compress(Tied().eval(), tokens, decomposition="svd", budget=Budget(params=0.8), calibration="none")
    model = load(save(result, tmp_path / "a"), Tied())
    with torch.no_grad():
        model.first[0].weight.mul_(2)
    again = load(save(model, tmp_path / "b"), Tied())
    assert again.first[0].weight is again.second[0].weight
    assert torch.equal(again.first[0].weight, model.first[0].weight)


STATES = [
    {"steps": 3, "scales": [0.1, 1e-12, -2.5], "name": "ü", "none": None, "nested": {"on": True}},
    [],
    "text",
    None,
    7,
]


@pytest.mark.parametrize("extra", STATES, ids=str)
def test_extra_state_in_jsons_types_comes_back(extra: Any, tmp_path: Path):
    result = compressed(Counted(12, extra))
    path = save(result, tmp_path / "out")
    assert json.loads((path / "state.json").read_text()) == {"4._extra_state": extra}
    assert set(load_plan(path).source["files"]) == {
        "model.safetensors", "metrics.json", "curves.json", "state.json",
    }  # fmt: skip
    loaded = load(path, skeleton(Counted(12, "another")))
    assert loaded[4].extra == extra
    assert same(loaded, result.model)
    assert load(save(loaded, tmp_path / "again"), skeleton(Counted(12, "another")))[4].extra == extra


def test_extra_state_that_is_a_tensor_goes_with_the_tensors(tmp_path: Path):
    result = compressed(Counted(12, torch.arange(3)))
    path = save(result, tmp_path / "out")
    assert not (path / "state.json").exists()
    assert torch.equal(load(path, skeleton(Counted(12, torch.zeros(1))))[4].extra, torch.arange(3))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({1, 2}, "is of type set;"),
        ((1, 2), "is of type tuple;"),
        ({"a": [1, b"bytes"]}, "is of type dict with a bytes inside;"),
        ({1: "a"}, "is of type dict with a key of type int inside;"),
        ({"a": torch.zeros(1)}, "is of type dict with a Tensor inside;"),
        (nn.ReLU(), "is of type ReLU;"),
    ],
    ids=str,
)
def test_other_extra_state_is_refused_in_one_line(extra: Any, message: str, tmp_path: Path):
    with pytest.raises(ArtifactError, match=message) as caught:
        save(compressed(Counted(12, extra)), tmp_path / "out")
    assert str(caught.value).startswith("4 (Counted): its extra state ")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_extra_state_and_the_model_have_to_fit(tmp_path: Path):
    path = save(compressed(Counted(12, 1)), tmp_path / "out")
    with pytest.raises(PlanError, match=r"do not fit the model: 4\._extra_state"):
        load(path, skeleton())
    with pytest.raises(PlanError, match=r"4 \(Ungrateful\) does not take back its extra state: no, thanks"):
        load(path, skeleton(Ungrateful(12, 1)))
    (path / "state.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"state\.json was truncated or altered"):
        load(path, skeleton(Counted(12, 1)))
    (path / "state.json").unlink()
    with pytest.raises(ArtifactError, match=r"state\.json is missing"):
        load(path, skeleton(Counted(12, 1)))
