"""From directory to directory: `rankfold finetune` as a user has it, on the embedded digits network."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from rankfold import load_plan
from rankfold.cli import main
from rankfold.decompositions import relative_error, wiring_of
from rankfold.files.artifact import digest, load, load_metrics
from rankfold.network.kinds import shape_of, stage_factors, weight_of
from rankfold.reports.demo import digits

ASSETS = Path(str(files("rankfold") / "assets"))
DATA = f"npz:{ASSETS / 'digits_test.npz'}"


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["rankfold", *args])
    with pytest.raises(SystemExit) as done:
        main()
    captured = capsys.readouterr()
    return int(done.value.code or 0), captured.out, captured.err


@pytest.fixture
def small(tmp_path: Path, capsys, monkeypatch) -> Path:
    out = tmp_path / "small"
    weights = ("--weights", str(ASSETS / "digits.safetensors"))
    options = ("-d", "spatial", "-b", "macs=0.3", "--calibration", "none", "--out", str(out), "--json")
    assert run(capsys, monkeypatch, "compress", "zoo:digits", *weights, *options)[0] == 0
    return out


def test_finetune_from_directory_to_directory(small: Path, tmp_path: Path, capsys, monkeypatch):
    out = tmp_path / "tuned"
    common = ("finetune", str(small), "--data", DATA, "--batch-size", "32", "--held-out", "40", "--out", str(out))
    terms = ("--layer-weights", "0.5", "--layer-outputs", "0.5", "--ema", "0.9", "--precision", "no", "--epochs", "2")
    code, text, err = run(capsys, monkeypatch, *common, *terms, "--test", DATA, "--json")
    report = json.loads(text)
    assert (code, err) == (0, "")
    assert set(report["test_top1"]) == set(report["held_out_top1"]) == {"original", "compressed", "fine-tuned"}
    assert report["test_top1"]["fine-tuned"] > report["test_top1"]["compressed"]
    assert report["held_out_top1"]["fine-tuned"] == report["epochs"][-1]["top1"]
    lines = list(csv.DictReader((tmp_path / "tuned.training" / "log.csv").open()))
    assert len(lines) == 2 * (320 // 32)
    assert {"loss", "task", "logits", "weights", "outputs", "rate", "examples_per_second"} <= set(lines[0])

    plan, model = load_plan(out), digits()[0]
    (first,) = plan.settings["fine_tunings"]
    assert (first["training"]["epochs"], first["examples"], first["teacher"]) == (2, 320, "original")
    assert plan.after == load_plan(small).after
    assert load_metrics(out)["fine_tuning"]["test_top1"] == report["test_top1"]
    student = load(out, model)
    layer = plan.decomposed[0]
    module = model.get_submodule(layer.name)
    wiring = wiring_of(layer.decomposition, shape_of(module))
    factors = stage_factors(student.get_submodule(layer.name), module, wiring, layer.ranks)
    error = relative_error(weight_of(module).double(), wiring, tuple(one.detach().double() for one in factors))
    assert layer.error == pytest.approx(error)

    code, text, err = run(capsys, monkeypatch, "evaluate", str(out), "--data", DATA, "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["compressed"]["top1"] == pytest.approx(report["test_top1"]["fine-tuned"])

    code, text, err = run(capsys, monkeypatch, *common, *terms, "--resume")  # there is nothing left to do
    assert (code, err) == (0, "")
    assert "fine-tuned" in text
    again = load(out, model)
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), again.state_dict().values(), strict=True)
    )
    for wrong, message in (
        (("--resume", "--epochs", "3"), "other settings"),
        (("--teacher", "zoo:digits"), "go together"),
        (("--optimiser", "lion"), "allowed: sgd, adamw"),
        (("--augment", "cifra"), "nearest: cifar"),
        (("--held-out", "360"), "cannot be held out"),
    ):
        code, _, err = run(capsys, monkeypatch, *common, *wrong)
        assert (code, message in err, err.count("\n")) == (2, True, 1), err


def test_another_teacher_and_no_labels(small: Path, tmp_path: Path, capsys, monkeypatch):
    out = tmp_path / "tuned"
    teacher = ("--teacher", "zoo:digits", "--teacher-weights", str(ASSETS / "digits.safetensors"))
    options = (
        "--no-labels",
        "--cutmix",
        "0.5",
        "--no-scaled",
        "--damping",
        "0",
        "--epochs",
        "1",
        "--batch-size",
        "32",
        "--out",
        str(out),
        "--json",
    )
    code, text, err = run(capsys, monkeypatch, "finetune", str(small), "--data", DATA, *teacher, *options)
    report = json.loads(text)
    assert (code, err) == (0, "")
    assert report["held_out_agreement"] == {}
    assert report["epochs"][0]["top1"] is None
    (first,) = load_plan(out).settings["fine_tunings"]
    assert (first["losses"]["logits"], first["training"]["scaled"], first["training"]["damping"]) == (1, False, 0)
    assert (first["teacher"], first["teacher_sha256"]) == ("zoo:digits", digest(ASSETS / "digits.safetensors"))

    stopped = (*options[:-2], str(tmp_path / "stopped"), "--json", "--patience", "1")
    code, text, err = run(capsys, monkeypatch, "finetune", str(small), "--data", DATA, "--test", DATA, *stopped)
    report = json.loads(text)
    assert (code, err) == (0, "")
    assert report["held_out_agreement"]["original"] == 100
    assert 0 < report["held_out_agreement"]["compressed"] < 100
    assert report["epochs"][0]["top1"] == report["held_out_agreement"]["fine-tuned"]
    assert set(report["test_top1"]) == {"original", "compressed", "fine-tuned"}

    again = ("--epochs", "1", "--batch-size", "32", "--out", str(tmp_path / "again"), "--json")
    code, _, err = run(capsys, monkeypatch, "finetune", str(out), "--data", DATA, *again)
    assert (code, err) == (0, "")
    assert load_plan(tmp_path / "again").settings["fine_tunings"][0] == first
    assert load_plan(tmp_path / "again").settings["fine_tunings"][1]["teacher"] == "original"


def test_inputs_made_from_the_network_take_the_place_of_data(small: Path, tmp_path: Path, capsys, monkeypatch):
    out = tmp_path / "tuned"
    common = ("finetune", str(small), "--batch-size", "32", "--epochs", "4", "--out", str(out))
    code, text, err = run(capsys, monkeypatch, *common, "--data", "synthetic:320", "--test", DATA, "--json")
    report = json.loads(text)
    assert (code, err) == (0, "")
    assert report["held_out_agreement"] == {}
    assert report["test_top1"]["fine-tuned"] > report["test_top1"]["compressed"]
    (only,) = load_plan(out).settings["fine_tunings"]
    assert (only["data"], only["losses"]["task"]) == ("synthetic:320", 0)
    code, _, err = run(capsys, monkeypatch, *common, "--data", "synthetic:many")
    assert (code, "for example synthetic:4096" in err) == (2, True)


def test_compress_fine_tunes_at_once(tmp_path: Path, capsys, monkeypatch):
    out = tmp_path / "tuned"
    weights = ("--weights", str(ASSETS / "digits.safetensors"))
    common = ("compress", "zoo:digits", *weights, "-d", "spatial", "-b", "macs=0.3", "--calibration", "none")
    options = ("--finetune", DATA, "--epochs", "2", "--test", DATA, "--out", str(out), "--json")
    code, text, err = run(capsys, monkeypatch, *common, *options)
    report = json.loads(text)
    assert (code, err) == (0, "")
    assert report["out"] == str(tmp_path / "tuned.compressed")
    assert report["fine_tuning"]["out"] == str(out)
    assert load_plan(out).after == load_plan(tmp_path / "tuned.compressed").after
    assert report["fine_tuning"]["test_top1"]["fine-tuned"] > report["fine_tuning"]["test_top1"]["compressed"]
    code, _, err = run(capsys, monkeypatch, *common, "--test", DATA, "--out", str(tmp_path / "other"))
    assert (code, "--test is for --finetune" in err) == (2, True)
    for wrong, message in (
        (("--finetune", "synthetic:many"), "for example synthetic:4096"),
        (("--finetune", "synthetic:32", "--test", "synthetic:32"), "synthetic:32"),
    ):
        code, _, err = run(capsys, monkeypatch, *common, *wrong, "--out", str(tmp_path / "other"))
        assert (code, message in err) == (2, True), err
    assert not (tmp_path / "other.compressed").exists()


def test_finalize_writes_a_program_that_runs_without_the_package(small: Path, tmp_path: Path, capsys, monkeypatch):
    out = tmp_path / "model.pt2"
    code, text, err = run(capsys, monkeypatch, "finalize", str(small), "--out", str(out), "--json")
    report = json.loads(text)
    assert (code, err) == (0, "")
    assert report["folded"] == 4
    assert report["bytes"] == out.stat().st_size
    x = digits()[1].batch(0, 7)[0]
    torch.save(x, tmp_path / "x.pt")
    script = (
        "import sys, torch\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "torch.save(program(torch.load(sys.argv[2])), sys.argv[3])\n"
        "assert not any(name.startswith('rankfold') for name in sys.modules)\n"
        "assert not any('norm' in str(node.target) for node in program.graph.nodes)"
    )
    found = tmp_path / "y.pt"
    subprocess.run([sys.executable, "-c", script, str(out), str(tmp_path / "x.pt"), str(found)], check=True)
    with torch.no_grad():
        expected = load(small, digits()[0])(x)
    torch.testing.assert_close(torch.load(found), expected, rtol=1e-4, atol=1e-4)
    assert [path.name for path in tmp_path.glob("*.pt2")] == ["model.pt2"]
    code, _, err = run(capsys, monkeypatch, "finalize", str(small), "--out", str(tmp_path / "model.tflite"))
    assert (code, "give one of .pt2, .onnx" in err) == (2, True)
