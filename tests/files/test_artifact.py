from __future__ import annotations

import json
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from networks import Tied
from processes import Running, run
from torch import nn

from rankfold import ArtifactError, Budget, PlanError, RankfoldError, Result, compress, load, load_plan, save
from rankfold.files import artifact as artifact_module
from rankfold.files.artifact import load_metrics


@pytest.fixture
def result(small_cnn: nn.Module, image: torch.Tensor) -> Result:
    return compress(small_cnn, image, decomposition=["tucker", "cp3"], budget=Budget(macs=0.5), calibration="none")


def skeleton() -> nn.Module:
    torch.manual_seed(9)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 16, 10),
    )  # fmt: skip


def test_what_is_loaded_is_bit_equal(result: Result, image: torch.Tensor, tmp_path: Path):
    path = save(result, tmp_path / "out", metrics={"note": "kept"})
    assert sorted(entry.name for entry in path.iterdir()) == [
        "curves.json", "metrics.json", "model.safetensors", "plan.json",
    ]  # fmt: skip
    loaded = load(path, skeleton())
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), result.model.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        assert torch.equal(loaded(image), result.model(image))
    assert load_plan(path).layers == result.plan.layers
    assert load_metrics(path)["note"] == "kept"


def _run_again(folder: Path) -> None:
    model = load(folder / "out", skeleton())
    with torch.no_grad():
        torch.save({"y": model(torch.load(folder / "x.pt", weights_only=True)["x"])}, folder / "y.pt")


def test_a_new_process_gets_the_same_bits(result: Result, image: torch.Tensor, tmp_path: Path):
    save(result, tmp_path / "out")
    torch.save({"x": image}, tmp_path / "x.pt")
    assert run(tmp_path, _run_again, tmp_path).returncode == 0
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True)["y"], result.model(image))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_saved_dtype_wins_over_the_skeletons(
    dtype: torch.dtype, small_cnn: nn.Module, image: torch.Tensor, tmp_path
):
    result = compress(
        small_cnn.to(dtype), image.to(dtype), decomposition="spatial", budget=Budget(macs=0.6), calibration="none"
    )
    loaded = load(save(result, tmp_path / "out"), skeleton())
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_ties_are_stored_once_and_come_back(tmp_path: Path):
    torch.manual_seed(0)
    result = compress(
        Tied().eval(), torch.arange(6)[None], decomposition="svd", budget=Budget(params=0.8), calibration="none"
    )
    loaded = load(save(result, tmp_path / "out"), Tied())
    assert loaded.shared is loaded.again
    assert loaded.first[0].weight is loaded.second[0].weight
    assert loaded.head.weight is loaded.embed.weight
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 4 * result.after.params + 4096


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGES = {
    "no plan": (lambda d: (d / "plan.json").unlink(), "holds no plan.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut plan": (lambda d: (d / "plan.json").write_bytes((d / "plan.json").read_bytes()[:200]), "not complete JSON"),
    "cut weights": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
        "truncated or altered",
    ),
    "binary plan": (lambda d: (d / "plan.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "other format": (lambda d: (d / "plan.json").write_text("{}"), "not a plan"),
    "other version": (lambda d: edit(d / "plan.json", lambda c: c.update(version=99)), "version 99"),
    "edited ranks": (lambda d: edit(d / "plan.json", lambda c: c["layers"][0].update(ranks=[1])), "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_directories_give_one_clear_error(damage: str, result: Result, tmp_path: Path):
    path = save(result, tmp_path / "out")
    spoil, message = DAMAGES[damage]
    spoil(path)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(path, skeleton())
    assert "\n" not in str(caught.value)


def test_one_flipped_bit_in_the_weights_is_noticed(result: Result, tmp_path: Path):
    path = save(result, tmp_path / "out") / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum"):
        load(tmp_path / "out", skeleton())


def test_another_model_is_refused(result: Result, tmp_path: Path):
    path = save(result, tmp_path / "out")
    with pytest.raises(PlanError):
        load(path, nn.Sequential(nn.Linear(4, 4)))
    wider = skeleton()
    wider[5] = nn.Linear(24 * 16, 11)
    with pytest.raises(PlanError):
        load(path, wider)


def test_nothing_but_a_saved_model_is_replaced(result: Result, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="holds other files"):
        save(result, tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file"):
        save(result, tmp_path / "file")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("point", ["save_file", "digest", "move_into_place"])
def test_a_failing_save_changes_nothing(point: str, result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(result, tmp_path / "out")
    before = {entry.name: entry.read_bytes() for entry in path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact_module, point, full)
    with pytest.raises(ArtifactError, match=r"No space left on device; nothing was changed; free some space"):
        save(result, tmp_path / "out")
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def _made() -> Result:
    x = torch.zeros(1, 3, 8, 8)
    return compress(skeleton(), x, decomposition="svd", budget=Budget(macs=0.5), calibration="none")


def _save_within(folder: Path, limit: int) -> None:
    result = _made()
    print("made", flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(ArtifactError, match="nothing was changed"):
        save(result, folder / "out")


def test_a_file_size_limit_stands_in_for_a_full_disk(result: Result, tmp_path: Path):
    save(result, tmp_path / "out")
    done = run(tmp_path, _save_within, tmp_path, 2000)
    assert done == (0, "made\n")
    assert load(tmp_path / "out", skeleton()) is not None
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "told-0"]


def _save_on_and_on(folder: Path) -> None:
    result = _made()
    print("ready", flush=True)
    while True:
        save(result, folder / "out")


def test_a_killed_save_leaves_one_whole_directory(result: Result, tmp_path: Path):
    save(result, tmp_path / "out")
    for delay in (0.0, 0.011, 0.04):
        running = Running(tmp_path, _save_on_and_on, tmp_path)
        while not running.told.read_text():
            assert running.process.is_alive()
            time.sleep(0.001)
        time.sleep(delay)
        running.process.kill()
        assert running.finished().returncode == -signal.SIGKILL
        assert load(tmp_path / "out", skeleton()) is not None


def test_every_error_is_a_rankfold_error():
    for name in ("ArtifactError", "BudgetError", "DataError", "ModelError", "PlanError", "UnknownNameError"):
        import rankfold

        assert issubclass(getattr(rankfold, name), RankfoldError)
