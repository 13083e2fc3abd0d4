"""Refining block by block, and distilling: accuracy of networks with and without, from unlabelled inputs alone.

ImageNet networks are calibrated and refined on 500 validation images, an eighth of which is held back to judge by, and
scored on 1,500 others; ResNet-20 on 512 training images and the CIFAR-10 test images. `--only CASE` runs some cases, a
case being MODEL:DECOMPOSITIONS:BUDGET:EPOCHS, 0 epochs without, or with :COPIES of every image, shifted and mirrored,
and :EPOCHS of distilling after it. `--synthetic` calibrates on inputs made from the network, `--synthetic 2048` on so
many.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import torch
from common import keep, parser, require_data
from units import image_record, images, opened, studied

from rankfold import Budget
from rankfold.calibration import Refining
from rankfold.evaluation import accuracy
from rankfold.progress import silent

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
    made.add_argument("--synthetic", type=int, nargs="?", const=0, help="on inputs made from the network, so many")
    arguments = made.parse_args()
    folder, count = require_data(arguments), arguments.synthetic
    origin = "" if count is None else f":synthetic{count or ''}"
    for (name, _), cases in groupby(arguments.only or CASES, lambda case: tuple(case.split(":")[:2])):
        model = opened(folder, name).model.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
        scored, batches = images(folder, name, 500)
        base, measured = accuracy(model, scored), None
        for case in cases:
            given = batches if count is None else "synthetic"
            measured = measured or studied(case, model, batches, given, silent, count or None)
            budget, epochs, copies, distilled = (*case.split(":")[2:], "0", "0")[:4]
            refining = Refining(int(epochs), copies=int(copies))
            recovery = replace(measured.recovery, refining=refining, distilling=int(distilled))
            result = replace(measured, recovery=recovery).compress(Budget(macs=float(budget)))
            refined = result.plan.settings.get("refined_blocks", {})
            entry = image_record(
                f"{case}{origin}",
                result,
                base,
                scored,
                epochs=refining.epochs,
                copies=refining.copies,
                distilled=recovery.distilling,
                calibration=f"{f'{count:,} ' if count else ''}{result.plan.settings['calibration']}",
                blocks=len(refined),
                blocks_improved=sum(after < before for before, after in refined.values()),
                study_seconds=round(measured.seconds, 1),
            )
            keep([entry])


if __name__ == "__main__":
    main()
