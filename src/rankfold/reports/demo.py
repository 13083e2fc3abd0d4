"""The main job on the embedded default: a small trained CNN at several budgets, on digits it has not seen."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import nn

from rankfold.budget import Budget, Cost
from rankfold.evaluation import accuracy, latency
from rankfold.files.artifact import load, save
from rankfold.pipeline import compress
from rankfold.progress import Progress, silent
from rankfold.sources.data import Dataset, Normalisation, open_dataset
from rankfold.sources.models import load_weights_
from rankfold.sources.zoo import entry

BUDGETS = (0.7, 0.5, 0.3)
DECOMPOSITIONS = ("spatial", "tucker", "cp3", "auto")


@dataclass(frozen=True)
class Row:
    """One line of the demonstration: what was asked for, what came out."""

    decomposition: str
    budget: float | None
    cost: Cost
    top1: float
    milliseconds: float
    seconds: float


def digits() -> tuple[nn.Module, Dataset]:
    """The trained network of the package, and the 360 digits held out from its training."""
    assets = files("rankfold") / "assets"
    known = entry("digits")
    model = known.build().eval()
    with as_file(assets / "digits.safetensors") as weights:
        load_weights_(model, weights)
    with as_file(assets / "digits_test.npz") as data:
        held_out = open_dataset(f"npz:{data}", known.input_shape, Normalisation(known.mean, known.std))
    return model, held_out


def demonstrate(progress: Progress = silent) -> list[Row]:
    """Compresses the digits network at every budget with every decomposition, by way of files, and measures each."""
    model, held_out = digits()
    example = torch.zeros(1, *held_out.input_shape)
    timed = held_out.batch(0, 64)[0]
    rows: list[Row] = []
    cases = [(budget, name) for budget in BUDGETS for name in DECOMPOSITIONS]
    with tempfile.TemporaryDirectory() as folder:
        for done, (budget, name) in enumerate(cases):
            progress("compressing digits", done, len(cases))
            result = compress(model, example, decomposition=name, budget=Budget(macs=budget), calibration="none")
            student = load(save(result, Path(folder) / f"{name}-{budget}"), model)
            before, after = latency((model, student), timed, rounds=20, warmup=3)
            if not rows:
                rows.append(Row("original", None, result.before, accuracy(model, held_out).top1, before, 0.0))
            top1 = accuracy(student, held_out).top1
            rows.append(Row(name, budget, result.after, top1, after * rows[0].milliseconds / before, result.seconds))
    progress("compressing digits", len(cases), len(cases))
    return rows
