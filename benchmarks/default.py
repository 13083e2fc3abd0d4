"""What `compress` should do when nothing but a budget is said: every decomposition and mixture, on six networks.

Calibrated on 128 unlabelled inputs and fitted as by default. On a seventh, ResNet-50, which would take an hour and a
half for all, those that the six leave are tried. Models are made and scored first, and kept in the folder `--work`;
with `--timed` those that are there are timed beside their originals, in turns, which wants a quiet machine. `--only
MODEL:DECOMPOSITION` runs some cases.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import keep, network, parser, record, recorded, require_data, unlabelled
from sklearn.datasets import load_digits
from torch import nn
from units import images, opened

from rankfold import Budget, ModelError, compress, load, save
from rankfold.decompositions import DECOMPOSITIONS
from rankfold.errors import BudgetError
from rankfold.evaluation import accuracy, latency
from rankfold.reports.demo import digits
from rankfold.sources.data import Dataset

NETWORKS = {
    "digits": 0.3,
    "mnist_lenet": 0.3,
    "cifar10_resnet20": 0.5,
    "cifar10_resnet32": 0.3,
    "mobilenet_v2": 0.8,
    "deit_tiny": 0.8,
    "resnet50": 0.7,
}
"""Networks with the share of their MACs that is kept."""
CHOICES = (*DECOMPOSITIONS, "interpolative", "svd,interpolative", "spatial,interpolative", "cp3,interpolative", "auto")
DATA = {"digits": "digits held out", "mnist": "MNIST test", "cifar10": "CIFAR-10 test"}
"""What networks are scored on, by the beginning of their names; others on ImageNet's validation images."""
COUNT = 128
"""Inputs to calibrate on."""
TIMED = (1, 16)
"""Batches whose time is taken."""


def main() -> None:
    """All cases, or some; each is written down once it is done."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", action="append", help="MODEL:DECOMPOSITION (repeatable)")
    arguments.add_argument("--work", type=Path, required=True, help="folder for the compressed models")
    arguments.add_argument("--timed", action="store_true", help="time what is there")
    given = arguments.parse_args()
    folder = require_data(given)
    cases = [tuple(case.split(":")) for case in given.only or ()] or list(itertools.product(NETWORKS, CHOICES))
    for name, group in itertools.groupby(cases, key=lambda case: case[0]):
        model, scored, batches = opened_with_inputs(folder, name)
        base = None
        for _, choice in group:
            place = given.work / f"{name}-{choice.replace(',', '-')}"
            if given.timed and place.exists():
                keep([{**recorded(f"{name}:{choice}"), **_times(model, load(place, model), batches[0][:1])}])
            elif not given.timed and not place.exists():
                base = base or accuracy(model, scored).top1
                try:
                    keep([_made(name, choice, model, batches, scored, base, place)])
                except (BudgetError, ModelError) as error:
                    print(f"{name}:{choice}: {error}", flush=True)


def opened_with_inputs(folder: Path, name: str) -> tuple[nn.Module, Dataset, list[torch.Tensor]]:
    """A network with its weights, examples to score it on, and `COUNT` inputs."""
    if name == "digits":
        small, held_out = digits()
        return small, held_out, [_other_digits(held_out)]
    if name == "mnist_lenet":
        source, scored = network(folder, name, name, "mnist/test.npz")
        batches = unlabelled(folder, source, "mnist/train.npz", COUNT)
    else:
        source = opened(folder, name)
        scored, batches = images(folder, name, COUNT)
    model: Any = source.model.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
    return model, scored, [batches[0][:COUNT]] if len(batches[0]) >= COUNT else batches


def _other_digits(scored: Dataset) -> torch.Tensor:
    """`COUNT` of scikit-learn's digits that are not among those that are scored."""
    digits: Any = load_digits()
    every = np.round(digits.images * 255 / 16).astype(np.uint8)
    held = {one.tobytes() for one in np.asarray(scored.x)}
    left = np.stack([one for one in every if one.tobytes() not in held])
    chosen = replace(scored, x=left, y=np.zeros(len(left), np.int64)).sample(COUNT)
    return chosen.batch(0, COUNT)[0]


def _made(
    name: str,
    choice: str,
    model: nn.Module,
    batches: list[torch.Tensor],
    scored: Dataset,
    base: float,
    place: Path,
) -> dict[str, Any]:
    """A record of a compressed network, which is saved."""
    result = compress(
        model,
        batches[0][:1],
        decomposition=choice.split(",") if "," in choice else choice,
        budget=Budget(macs=NETWORKS[name]),
        calibration=batches,
    )
    reached = accuracy(result.model, scored)
    save(result, place)
    return record(
        case=f"{name}:{choice}",
        model=name,
        method=choice,
        budget=NETWORKS[name],
        macs_kept=round(result.after.kept(result.before)["macs"], 4),
        params_kept=round(result.after.kept(result.before)["params"], 4),
        base_top1=round(base, 2),
        top1=round(reached.top1, 2),
        lost=round(base - reached.top1, 2),
        examples=reached.examples,
        data=DATA.get(name.partition("_")[0], "ImageNet validation"),
        seconds=round(result.seconds, 1),
    )


def _times(model: nn.Module, small: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """The share of the original's time that a compressed network takes, by batch."""
    times = {}
    for batch in TIMED:
        inputs = x.repeat(batch, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        before, after = latency((model, small), inputs, seconds=3.0)
        times[f"time_kept_{batch}"] = round(after / before, 3)
    return times


if __name__ == "__main__":
    main()
