"""Refining block by block: accuracy of networks with and without it, from unlabelled inputs alone.

ImageNet networks are calibrated and refined on 500 validation images, an eighth of which is held back to judge by, and
scored on 1,500 others; ResNet-20 on 512 training images and the CIFAR-10 test images. `--only CASE` runs some cases, a
case being MODEL:DECOMPOSITIONS:BUDGET:EPOCHS; 0 epochs are without.
"""

from __future__ import annotations

import resource
from dataclasses import replace
from itertools import groupby

import torch
from common import accuracy_record, keep, parser, require_data
from units import images, opened

from rankfold import Budget, study
from rankfold.evaluation import accuracy

CASES = tuple(
    f"{network}:{budget}:{epochs}"
    for network, budgets, most in (
        ("mobilenet_v2:interpolative", (0.8, 0.7, 0.5), 6),
        ("deit_tiny:svd,interpolative", (0.8, 0.7, 0.5), 12),
        ("resnet50:svd,interpolative", (0.8, 0.7, 0.5, 0.35), 4),
        ("cifar10_resnet20:cp3", (0.5, 0.3, 0.2), 12),
    )
    for budget in budgets
    for epochs in (0, most)
)


def main() -> None:
    """Writes the records of all cases, or of those asked for."""
    made = parser(__doc__ or "")
    made.add_argument("--only", action="append", help="a case (repeatable)")
    arguments = made.parse_args()
    folder = require_data(arguments)
    for (name, decomposition), cases in groupby(arguments.only or CASES, lambda case: tuple(case.split(":")[:2])):
        model = opened(folder, name).model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        scored, batches = images(folder, name, 500)
        base, found = accuracy(model, scored), None
        for case in cases:
            budget, epochs = Budget(macs=float(case.split(":")[2])), int(case.split(":")[3])
            found = found or study(
                model,
                torch.zeros(1, *batches[0].shape[1:]),
                decomposition=decomposition.split(",") if "," in decomposition else decomposition,
                budget=budget,
                calibration=batches,
            )
            result = replace(found, refine=epochs).compress(budget)
            reached = accuracy(result.model, scored)
            refined = result.plan.settings.get("refined_blocks", {})
            entry = accuracy_record(
                decomposition,
                result,
                reached,
                base,
                case=case,
                model=name,
                data="CIFAR-10 test" if "cifar" in name else "ImageNet validation",
                budget=float(case.split(":")[2]),
                epochs=epochs,
                lost=round(base.top1 - reached.top1, 2),
                blocks=len(refined),
                blocks_improved=sum(after < before for before, after in refined.values()),
                study_seconds=round(found.seconds, 1),
                peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            )
            print(f"{case}: {entry['lost']} points lost, {entry['seconds']} s", flush=True)
            keep([entry])


if __name__ == "__main__":
    main()
