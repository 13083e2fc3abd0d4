"""What every benchmark shares: the data folder, the machine's name, and dated records."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold import Budget, Cost, Result
from rankfold.evaluation import Accuracy
from rankfold.network.costs import cost_of
from rankfold.network.finding import Layers, find_layers
from rankfold.planning import assign, measure, pose
from rankfold.search import Problem
from rankfold.search.curves import Curve
from rankfold.sources.data import Dataset, open_dataset
from rankfold.sources.models import Source, build_model, load_weights_

RESULTS = Path(__file__).resolve().parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments with the folder of real networks and data, as RANKFOLD_DATA or --data."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--data", type=Path, default=os.environ.get("RANKFOLD_DATA"), help="folder of networks and data")
    return made


def require_data(arguments: argparse.Namespace) -> Path:
    """The data folder; ends with one line where it is not given."""
    if arguments.data is None or not Path(arguments.data).is_dir():
        sys.exit("give the folder of real networks and data with --data, or in RANKFOLD_DATA")
    return Path(arguments.data)


def network(folder: Path, name: str, weights: str, dataset: str) -> tuple[Source, Dataset]:
    """A zoo network with its weights, and labelled data in its normalisation."""
    source = build_model(f"zoo:{name}")
    load_weights_(source.model, folder / "weights" / f"{weights}.safetensors")
    assert source.input_shape is not None
    assert source.normalisation is not None
    return source, open_dataset(f"npz:{folder / dataset}", source.input_shape, source.normalisation)


def unlabelled(folder: Path, source: Source, dataset: str, count: int = 512) -> list[torch.Tensor]:
    """Evenly spaced training images, in batches of 128: of CIFAR-10, 512 are every 97th."""
    assert source.input_shape is not None
    assert source.normalisation is not None
    chosen = open_dataset(f"npz:{folder / dataset}", source.input_shape, source.normalisation).sample(count)
    return [chosen.batch(start, start + 128)[0] for start in range(0, count, 128)]


@dataclass(frozen=True)
class Posed:
    """A network's curves, measured once, from which the search problem of any budget follows."""

    layers: Layers
    curves: tuple[Curve, ...]
    before: Cost
    seconds: float

    def __call__(self, **budget: float) -> Problem:
        return pose(self.curves, self.before, Budget.parse([f"{unit}={limit}" for unit, limit in budget.items()]))


def posed(
    model: nn.Module,
    example: torch.Tensor,
    decomposition: str,
    *,
    units: tuple[str, ...] = ("macs",),
    include: Sequence[str] | None = None,
) -> Posed:
    """The curves of a network, and the seconds they took."""
    before = cost_of(model, example)
    choices, layers = assign(find_layers(model, example, include=include), decomposition)
    start = time.perf_counter()
    curves = measure(model, layers, choices, units=units)
    return Posed(layers, curves, before, time.perf_counter() - start)


def machine() -> str:
    """Processor, cores in use and torch version."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}"


def record(**values: Any) -> dict[str, Any]:
    """A record with the command, of paths the names alone, the date and the machine that made it."""
    given = [Path(one).name if os.sep in one else one for one in sys.argv[1:]]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *given])
    return {**values, "command": command, "date": datetime.date.today().isoformat(), "machine": machine()}


def accuracy_record(method: str, result: Result, scored: Accuracy, base: Accuracy, **values: Any) -> dict[str, Any]:
    """A record of a compressed network's accuracy; `values` say at least which `model` and `data` it is of."""
    kept = result.after.kept(result.before)
    return record(
        method=method,
        examples=scored.examples,
        top1=round(scored.top1, 2),
        base_top1=round(base.top1, 2),
        macs_kept=round(kept["macs"], 4),
        params_kept=round(kept["params"], 4),
        seconds=round(result.seconds, 2),
        error_reached=sum(layer.error for layer in result.plan.layers),
        **values,
    )


def write(records: list[dict[str, Any]]) -> None:
    """The records as benchmarks/results/SCRIPT-DATE.json, and on standard output."""
    RESULTS.mkdir(exist_ok=True)
    path = _todays()
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)
    print(json.dumps(records, indent=2, ensure_ascii=False))


def recorded(case: str) -> dict[str, Any]:
    """Today's record of a case."""
    return next(one for one in json.loads(_todays().read_text()) if one["case"] == case)


def keep(records: Sequence[dict[str, Any]]) -> None:
    """Writes records to today's file, in place of earlier ones of the same cases."""
    path = _todays()
    cases = {one["case"] for one in records}
    earlier = json.loads(path.read_text()) if path.exists() else []
    write([*(one for one in earlier if one["case"] not in cases), *records])


def _todays() -> Path:
    return RESULTS / f"{Path(sys.argv[0]).stem}-{datetime.date.today().isoformat()}.json"
