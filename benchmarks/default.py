"""What `compress` should do when nothing but a budget is said: every decomposition and mixture, on five networks.

Accuracy on 128 unlabelled inputs, calibrated and fitted as by default, and the time beside the original's, in turns.
`--only MODEL:DECOMPOSITION` runs some cases.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from common import keep, network, parser, record, require_data, unlabelled
from units import images, opened

from rankfold import Budget, ModelError, compress
from rankfold.decompositions import DECOMPOSITIONS
from rankfold.errors import BudgetError
from rankfold.evaluation import accuracy, latency

NETWORKS = {"mnist_lenet": 0.3, "cifar10_resnet20": 0.5, "cifar10_resnet32": 0.3, "mobilenet_v2": 0.8, "deit_tiny": 0.8}
"""Networks with the share of their MACs that is kept."""
CHOICES = (*DECOMPOSITIONS, "interpolative", "svd,interpolative", "cp3,interpolative", "auto")
COUNT = 128
"""Inputs to calibrate on."""
TIMED = (1, 16)
"""Batches whose time is taken."""


def main() -> None:
    """All cases, or some; each is written down once it is done."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", action="append", help="MODEL:DECOMPOSITION (repeatable)")
    given = arguments.parse_args()
    folder = require_data(given)
    cases = [tuple(case.split(":")) for case in given.only or ()] or list(itertools.product(NETWORKS, CHOICES))
    for name, group in itertools.groupby(cases, key=lambda case: case[0]):
        if name == "mnist_lenet":
            source, scored = network(folder, name, name, "mnist/test.npz")
            batches = unlabelled(folder, source, "mnist/train.npz", COUNT)
        else:
            source = opened(folder, name)
            scored, batches = images(folder, name, COUNT)
        model: Any = source.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batches = [batches[0][:COUNT]] if len(batches[0]) >= COUNT else batches
        base = accuracy(model, scored)
        for _, choice in group:
            try:
                result = compress(
                    model,
                    batches[0][:1],
                    decomposition=choice.split(",") if "," in choice else choice,
                    budget=Budget(macs=NETWORKS[name]),
                    calibration=batches,
                )
            except (BudgetError, ModelError) as error:
                print(f"{name}:{choice}: {error}", flush=True)
                continue
            reached = accuracy(result.model, scored)
            times = {}
            for batch in TIMED:
                x = batches[0][:1].repeat(batch, 1, 1, 1).contiguous(memory_format=torch.channels_last)
                before, after = latency((model, result.model), x, seconds=4.0)
                times[f"time_kept_{batch}"] = round(after / before, 3)
            keep(
                [
                    record(
                        case=f"{name}:{choice}",
                        model=name,
                        method=choice,
                        budget=NETWORKS[name],
                        top1=round(reached.top1, 2),
                        lost=round(base.top1 - reached.top1, 2),
                        examples=reached.examples,
                        **times,
                        seconds=round(result.seconds, 1),
                    )
                ]
            )


if __name__ == "__main__":
    main()
