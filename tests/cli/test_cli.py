"""The command line as a user has it: in a process of its own where the exit code counts, in this one elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import run

from rankfold.files.artifact import load_plan, load_trace

FACTORY = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(576, 10))

def broken():
    raise ValueError("no such thing")

def number():
    return 3
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(FACTORY)
    return f"{tmp_path / 'nets.py'}:small"


def test_compress_and_evaluate_in_json(factory: str, npz: Path, tmp_path: Path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ("compress", factory, "--input-shape", "3,8,8", "-d", "spatial,cp3", "-b", "macs=0.5", "-b", "params=0.9")
    code, text, err = run(capsys, monkeypatch, *command, "--out", str(out), "--json")
    report = json.loads(text)
    assert (code, err) == (0, "")
    assert report["after"]["macs"] <= 0.5 * report["before"]["macs"]
    assert {"name", "decomposition", "ranks", "error"} <= set(report["layers"][0])
    assert report["out"] == str(out)
    assert set(report) >= {"before", "after", "seconds", "out", "layers", "skipped"}
    code, text, err = run(capsys, monkeypatch, "evaluate", str(out), "--data", f"npz:{npz}", "--original", "--json")
    report = json.loads(text)
    assert (code, err) == (0, "")
    assert report["examples"] == 40
    for side in ("original", "compressed"):
        assert set(report[side]) == {"top1", "top5", "params", "macs", "bytes", "latency_ms"}
        assert 0 <= report[side]["top1"] <= report[side]["top5"] <= 100
    code, text, _ = run(capsys, monkeypatch, "evaluate", str(out), "--data", f"npz:{npz}")
    assert code == 0
    assert "not scored" in text


def test_analyze(factory: str, capsys, monkeypatch):
    code, text, _ = run(capsys, monkeypatch, "analyze", factory, "--input-shape", "3,8,8", "--json")
    report = json.loads(text)
    assert code == 0
    assert [layer["name"] for layer in report["layers"]] == ["0", "2", "4"]
    assert set(report["layers"][1]["savings"]) == {"svd", "spatial", "tucker", "tt", "cp", "cp3", "ring"}
    code, text, _ = run(capsys, monkeypatch, "analyze", factory, "--input-shape", "3,8,8", "-d", "svd")
    assert code == 0
    assert "whole network" in text


def test_decompositions_by_pattern(factory: str, tmp_path: Path, capsys, monkeypatch):
    given = (
        "compress",
        factory,
        "--input-shape",
        "3,8,8",
        "-d",
        "2=tucker",
        "-d",
        "4=svd",
        "-b",
        "params=0.5",
        "-b",
        "macs=0.6",
    )
    code, text, _ = run(capsys, monkeypatch, *given, "--out", str(tmp_path / "o"), "--json")
    report = json.loads(text)
    assert code == 0
    assert {layer["name"]: layer["decomposition"] for layer in report["layers"]} == {"2": "tucker", "4": "svd"}
    assert "no pattern" in report["skipped"]["0"]


MISTAKES = {
    "unknown zoo network": (["zoo:cifar10_resnet2"], "cifar10_resnet20"),
    "no such form": (["resnet"], "not of the form"),
    "missing module": (["no.such.module:f"], "cannot be imported"),
    "missing file": (["nowhere.py:f"], "does not exist"),
    "missing factory": (["{folder}/nets.py:smal"], "nearest: small"),
    "failing factory": (["{folder}/nets.py:broken"], "ValueError: no such thing"),
    "not a module": (["{folder}/nets.py:number"], "returned int"),
    "no input shape": (["{folder}/nets.py:small"], "give --input-shape"),
    "bad input shape": (["{folder}/nets.py:small", "--input-shape", "3,a"], "not a list of positive sizes"),
    "wrong input shape": (["{folder}/nets.py:small", "--input-shape", "4,8,8"], "does not run on example inputs"),
    "missing weights": (["zoo:digits", "--weights", "nowhere.safetensors"], "do not exist"),
    "unreadable weights": (["zoo:digits", "--weights", "{folder}/nets.pt"], "cannot be read as plain tensors"),
    "unreadable safetensors": (["zoo:digits", "--weights", "{folder}/nets.safetensors"], "cannot be read"),
    "unknown kind of weights": (["zoo:digits", "--weights", "{folder}/nets.py"], "unknown kind"),
    "unknown decomposition": (["zoo:digits", "-d", "tuckr"], "nearest: tucker"),
    "pattern for nothing": (["zoo:digits", "--exclude", "layer9"], "matches nothing"),
    "unknown option": (["zoo:digits", "--nonsense"], "No such option"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_two(mistake: str, factory: str, tmp_path: Path, capsys, monkeypatch):
    for name in ("nets.pt", "nets.safetensors"):
        (tmp_path / name).write_bytes(b"not weights at all")
    args, message = MISTAKES[mistake]
    args = [arg.replace("{folder}", str(tmp_path)) for arg in args]
    code, out, err = run(capsys, monkeypatch, "compress", *args, "-b", "macs=0.5", "--out", str(tmp_path / "o"))
    assert code == 2
    assert out == ""
    assert err.startswith("rankfold: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("budget", "search", "message"),
    [
        ("macs=1.5", "exact", "not in (0, 1]"),
        ("flops=0.5", "exact", "budget unit 'flops'"),
        ("macs=0.5", "exakt", "nearest: exact"),
        ("macs=0.0001", "exact", "smallest feasible one is at least macs="),
    ],
)
def test_mistaken_budgets_and_searches(budget: str, search: str, message: str, tmp_path: Path, capsys, monkeypatch):
    args = ("compress", "zoo:digits", "-d", "tucker", "-b", budget, "--search", search, "--out", str(tmp_path / "o"))
    code, _, err = run(capsys, monkeypatch, *args)
    assert code == 2
    assert message in err


def test_mistaken_data(factory: str, tmp_path: Path, capsys, monkeypatch):
    out = str(tmp_path / "o")
    run(capsys, monkeypatch, "compress", factory, "--input-shape", "3,8,8", "-b", "macs=0.6", "--out", out)
    np.savez(tmp_path / "nolabels.npz", x=np.zeros((3, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "large.npz", x=np.zeros((3, 9, 9, 3), np.uint8), y=np.zeros(3, np.int64))
    np.savez(tmp_path / "classes.npz", x=np.zeros((3, 8, 8, 3), np.uint8), y=np.array([0, 1, 99]))
    np.savez(tmp_path / "pickle.npz", x=np.array([{}], dtype=object), y=np.zeros(1, np.int64))
    (tmp_path / "text.npz").write_text("hello")
    for spec, message in {
        "npz:nowhere.npz": "does not exist",
        f"npz:{tmp_path}/nolabels.npz": "lacks the array 'y'",
        f"npz:{tmp_path}/large.npz": "inputs of shape (9, 9, 3), the model takes (3, 8, 8)",
        f"npz:{tmp_path}/classes.npz": "labels up to 99",
        f"npz:{tmp_path}/pickle.npz": "not a readable .npz",
        f"npz:{tmp_path}/text.npz": "not a readable .npz",
        f"imagefolder:{tmp_path}/none": "is not a directory",
        "nonsense": "not of the form",
    }.items():
        code, _, err = run(capsys, monkeypatch, "evaluate", out, "--data", spec)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    code, _, err = run(capsys, monkeypatch, "evaluate", str(tmp_path), "--data", "npz:x.npz")
    assert code == 2
    assert "holds no plan.json" in err


def test_without_arguments_help_is_shown(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch)
    assert code == 0
    assert "compress" in out + err


def test_the_installed_command_answers_and_fails_without_a_traceback(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "rankfold",
        "compress",
        "zoo:nothing",
        "-b",
        "macs=0.5",
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_images_in_folders(tmp_path: Path, capsys, monkeypatch, factory: str):
    image = pytest.importorskip("PIL.Image")
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for k in range(3):
            image.fromarray(np.full((12, 10, 3), 40 * k, np.uint8)).save(tmp_path / "images" / label / f"{k}.png")
    out = str(tmp_path / "o")
    run(capsys, monkeypatch, "compress", factory, "--input-shape", "3,8,8", "-b", "macs=0.6", "--out", out)
    args = (
        "evaluate",
        out,
        "--data",
        f"imagefolder:{tmp_path / 'images'}",
        "--mean",
        "0.5,0.5,0.5",
        "--std",
        "0.2,0.2,0.2",
    )
    code, text, _ = run(capsys, monkeypatch, *args, "--json")
    assert code == 0
    assert json.loads(text)["examples"] == 6


def test_blocks_are_refined_where_that_is_asked_for(factory: str, npz: Path, tmp_path: Path, capsys, monkeypatch):
    out, ends = tmp_path / "refined", ("--calibration", f"npz:{npz}", "--calibration-samples", "16", "--refine", "2")
    common = ("compress", factory, "--input-shape", "3,8,8", "-d", "spatial", "--json", "-b", "macs=0.5")
    code, text, err = run(capsys, monkeypatch, *common, *ends, "--out", str(out))
    assert (code, err) == (0, "")
    blocks = load_plan(out).settings["refined_blocks"]
    gained = sum(after < before for before, after in blocks.values())
    assert f"{gained} of {len(blocks)} blocks refined" in json.loads(text)["calibration"] or not gained


def test_searches_objectives_and_limits_on_the_error(factory: str, npz: Path, tmp_path: Path, capsys, monkeypatch):
    common = ("compress", factory, "--input-shape", "3,8,8", "-d", "spatial", "--json")
    rene = ("--search", "rene", "-b", "macs=0.5")
    out = tmp_path / "rene"
    code, text, err = run(capsys, monkeypatch, *common, *rene, "--out", str(out))
    assert (code, err) == (0, "")
    trace = load_trace(out)
    assert trace["layers"] == [layer["name"] for layer in json.loads(text)["layers"]]
    assert {"stage", "iteration", "losses", "costs", "entropy", "likeliest"} <= set(trace["steps"][0])

    out, checkpoint = tmp_path / "divergence", tmp_path / "search.json"
    ends = ("--objective", "divergence", "--data", f"npz:{npz}", "--samples", "16", "--checkpoint", str(checkpoint))
    code, text, err = run(capsys, monkeypatch, *common, *rene, *ends, "--out", str(out))
    assert (code, err) == (0, "")
    assert checkpoint.is_file()
    assert any("objective" in step["losses"] for step in load_trace(out)["steps"])

    out = tmp_path / "calibrated"
    ends = ("-b", "macs=0.5", "--calibration", f"npz:{npz}", "--calibration-samples", "8")
    code, text, err = run(capsys, monkeypatch, *common, *ends, "--out", str(out))
    assert (code, err) == (0, "")
    assert load_plan(out).settings["metric"] == "second moments"
    assert json.loads(text)["calibration"] == "calibration: 8 given inputs (asked for); fitted in forward order"
    code, text, err = run(capsys, monkeypatch, *common, *ends, "--no-sequential", "--out", str(out))
    assert json.loads(text)["calibration"].endswith("fitted layer by layer")
    code, text, err = run(capsys, monkeypatch, *common, "-b", "macs=0.5", "--out", str(out))
    assert "512 synthetic inputs (noise with the spectrum of images" in json.loads(text)["calibration"]
    code, text, err = run(capsys, monkeypatch, *common, *ends[:2], "--calibration", "none", "--out", str(out))
    assert json.loads(text)["calibration"] == "calibration: none, errors are those of the weights (asked for)"

    ends = ("-b", "macs=0.5", "--calibration", "synthetic", "--calibration-samples", "8")
    code, text, err = run(capsys, monkeypatch, *common, *ends, "--out", str(tmp_path / "synthetic"))
    assert (code, err) == (0, "")

    out = tmp_path / "error"
    code, text, err = run(capsys, monkeypatch, *common, "-b", "error=0.1", "-b", "minimise=params", "--out", str(out))
    assert (code, err) == (0, "")
    layers = json.loads(text)["layers"]
    assert 0 < sum(layer["error"] for layer in layers) <= 0.1 * len(layers) * (1 + 1e-6)
    assert load_trace(out) is None

    for wrong, message in (
        ((*rene, "--objective", "divergence"), "needs inputs; give them with --data"),
        ((*rene, "--objective", "divergense"), "nearest: divergence"),
        (("-b", "macs=0.5", "--objective", "divergence"), "are for --search rene"),
    ):
        code, _, err = run(capsys, monkeypatch, *common, *wrong, "--out", str(tmp_path / "none"))
        assert (code, message in err, err.count("\n")) == (2, True, 1)
