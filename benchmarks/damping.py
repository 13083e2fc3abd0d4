"""What damping does to CP factors: how far their terms cancel, and accuracy in float32 and in bfloat16.

ResNet-20 with cp3 at 29.6 % of its MACs and 27.7 % of its parameters, calibrated on 512 training images; top-1 on the
5,000 training images that fine-tuning holds out. (The original was trained on them, so they score far above test data.)
"""

from __future__ import annotations

import time

import torch
from common import network, parser, record, require_data, unlabelled, write

from rankfold import Budget, compress
from rankfold.decompositions import sensitivity
from rankfold.evaluation import accuracy
from rankfold.network.copies import duplicate
from rankfold.training import Geometry, split


def main() -> None:
    """Compresses once, damps at every strength, records."""
    folder = require_data(parser(__doc__ or "").parse_args())
    source, images = network(folder, "cifar10_resnet20", "cifar10_resnet20", "cifar10/train.npz")
    held_out = split(images, 5000)[1]
    result = compress(
        source.model,
        torch.zeros(1, 3, 32, 32),
        decomposition="cp3",
        budget=Budget(macs=0.296, params=0.277),
        calibration=unlabelled(folder, source, "cifar10/train.npz"),
    )
    records = []
    for damping in (0.0, 1e-4, 3e-4, 1e-3, 3e-3):
        student, start = duplicate(result.model), time.perf_counter()
        geometry = Geometry(student, source.model, result.plan)
        geometry.damp_(damping)
        seconds = time.perf_counter() - start
        found = [
            round(sensitivity(layer.wiring, layer.factors([weight.detach().double() for weight in layer.weights])), 1)
            for layer in geometry.layers
        ]
        plain = accuracy(student, held_out).top1
        with torch.autocast("cpu", torch.bfloat16):
            narrow = accuracy(student, held_out).top1
        records.append(
            record(
                damping=damping,
                sensitivities=found,
                top1=round(plain, 2),
                bf16_top1=round(narrow, 2),
                seconds=round(seconds, 1),
                data="CIFAR-10 train, held out",
                examples=len(held_out),
            )
        )
    write(records)


if __name__ == "__main__":
    main()
