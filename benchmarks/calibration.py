"""Calibration: none, synthetic inputs, or a few real ones without their labels; accuracy without fine-tuning.

ResNet-20 and ResNet-32 (9,980 CIFAR-10 test images; 512 training images, every 97th), LeNet (MNIST), MobileNetV2 and
DeiT-Tiny (500 ImageNet images: 64 to calibrate on, the other 436 for all scores). Then ResNet-20 on 16 to 4,096 images.
`--only NAME` runs one part; its records replace its earlier ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, accuracy_record, network, parser, require_data, unlabelled, write
from torch import nn

from rankfold import Budget, compress
from rankfold.calibration.moments import Calibration, calibrate
from rankfold.calibration.synthetic import synthetic_like
from rankfold.evaluation import accuracy
from rankfold.network.finding import find_layers
from rankfold.sources.data import Dataset
from rankfold.sources.models import Source

CIFAR = ("cifar10_resnet20", "cifar10_resnet32")
IMAGENET = {"mobilenet_v2": "imagenet_mobilenet_v2", "deit_tiny": "imagenet_deit_tiny"}
PARTS = (*CIFAR, "mnist_lenet", *IMAGENET, "samples")
COUNTS = (16, 64, 256, 1024, 4096)


@dataclass
class Stages:
    """A progress report that keeps how long each stage took: from its first word to that of the next."""

    seconds: dict[str, float] = field(default_factory=dict)
    current: str = ""
    since: float = 0.0

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None:
        if what != self.current:
            self.end()
            self.current, self.since = what, time.perf_counter()

    def end(self) -> None:
        """Closes the stage that is running."""
        if self.current:
            taken = time.perf_counter() - self.since
            self.seconds[self.current] = round(self.seconds.get(self.current, 0.0) + taken, 1)
        self.current = ""


def opened(folder: Path, name: str) -> tuple[Source, Dataset, str, list[torch.Tensor]]:
    """A network, the data it is scored on and what they are called, and inputs to calibrate on."""
    if name in IMAGENET:
        source, images = network(folder, name, IMAGENET[name], "imagenet_sample/images.npz")
        chosen = np.arange(0, 7 * 64, 7)
        rest = np.setdiff1d(np.arange(len(images)), chosen)
        held, scored = (replace(images, x=np.asarray(images.x)[part], y=images.y[part]) for part in (chosen, rest))
        return source, scored, "ImageNet sample, 436 of 500", [held.batch(k, k + 32)[0] for k in range(0, 64, 32)]
    data = "mnist" if name == "mnist_lenet" else "cifar10"
    source, scored = network(folder, name, name, f"{data}/test.npz")
    called = "MNIST test" if data == "mnist" else "CIFAR-10 test"
    return source, scored, called, unlabelled(folder, source, f"{data}/train.npz")


def calibrated(
    model: nn.Module, shape: tuple[int, ...], inputs: list[torch.Tensor] | None
) -> tuple[Calibration, Stages]:
    """Moments of every layer on these inputs, or on synthetic ones, and the seconds that took."""
    stages, example = Stages(), torch.zeros(1, *shape)
    name = "given inputs" if inputs is not None else "synthetic inputs"
    batches = inputs if inputs is not None else synthetic_like(model, example, progress=stages)
    found = calibrate(model, find_layers(model, example).found, batches, source=name, progress=stages)
    stages.end()
    return found, stages


def records_of(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """The records of a part, one by one."""
    name = part if part != "samples" else CIFAR[0]
    source, scored, called, real = opened(folder, name)
    shape = source.input_shape
    assert shape is not None
    base = accuracy(source.model, scored)
    given: dict[str, list[torch.Tensor] | str | None]
    if part == "samples":
        budgets: tuple[float, ...] = (0.2,)
        given = {f"real, {n}": unlabelled(folder, source, "cifar10/train.npz", n) for n in COUNTS}
    else:
        budgets = (0.95, 0.9, 0.8) if name in IMAGENET else (0.5, 0.3, 0.2)
        given = {"none": "none", "synthetic": None, f"real, {sum(map(len, real))}": real}
    for label, inputs in given.items():
        known, before = ("none", Stages()) if isinstance(inputs, str) else calibrated(source.model, shape, inputs)
        for budget in budgets:
            stages = Stages(dict(before.seconds))
            result = compress(
                source.model,
                torch.zeros(1, *shape),
                decomposition="cp3",
                budget=Budget(macs=budget),
                calibration=known,
                progress=stages,
            )
            stages.end()
            found = accuracy(result.model, scored)
            yield accuracy_record(
                label,
                result,
                found,
                base,
                model=name,
                data=called,
                part=part,
                budget=budget,
                difference=round(found.top1 - base.top1, 2),
                params=result.after.params,
                macs=result.after.macs,
                samples=result.plan.settings.get("calibration_samples", 0),
                stages=stages.seconds,
            )


def main() -> None:
    """All parts, or one."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", choices=PARTS, action="append", help="run this part alone (repeatable)")
    given = arguments.parse_args()
    folder = require_data(given)
    earlier = sorted(RESULTS.glob("calibration-*.json"))
    kept = json.loads(earlier[-1].read_text()) if earlier and given.only else []
    for part in given.only or PARTS:
        kept = [one for one in kept if one["part"] != part]
        for one in records_of(folder, part):
            kept.append(one)
            print(one["model"], one["method"], one["budget"], one["top1"], one["stages"], flush=True)
        write(kept)


if __name__ == "__main__":
    main()
