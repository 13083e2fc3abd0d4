"""Training throughput: images per second of `fine_tune` over those of a plain eager float32 loop, in turns in one run.

ResNet-20 compressed with cp3 to 28 % of its MACs from the weights alone; batches of 128 CIFAR-10 images, the original
as the teacher, cross-entropy and softened outputs, SGD; the same student, teacher, images and steps on both sides.
"""

from __future__ import annotations

import statistics
import time

import torch
from common import network, parser, record, require_data, write
from torch import nn

from rankfold import Budget, Result, compress
from rankfold.network.copies import duplicate
from rankfold.search.network_objectives import softened
from rankfold.sources.data import Dataset
from rankfold.training import Training, fine_tune
from rankfold.training.augment import cifar

BATCH, STEPS, ROUNDS = 128, 12, 5


def plain(student: nn.Module, teacher: nn.Module, data: Dataset) -> float:
    """Images per second of a loop as one would write it."""
    model = duplicate(student).train()
    optimiser = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for step in range(STEPS):
        x, y = data.batch(step * BATCH, (step + 1) * BATCH)
        x = cifar(x, data.black, generator).contiguous()
        with torch.no_grad():
            taught = teacher(x)
        output = model(x)
        loss = nn.functional.cross_entropy(output, y) + softened(output, taught, 4.0)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
    return STEPS * BATCH / (time.perf_counter() - start)


def ours(result: Result, teacher: nn.Module, data: Dataset, precision: str) -> float:
    """Images per second of `fine_tune`, its own steps alone, and not the trial before them."""
    training = Training(epochs=1, batch_size=BATCH, augment="cifar", precision=precision)
    trained = fine_tune(result.model, data, teacher=teacher, plan=result.plan, training=training)
    return STEPS * BATCH / trained.epochs[0].seconds


def main() -> None:
    """Both in turns, after a warm-up of each."""
    folder = require_data(parser(__doc__ or "").parse_args())
    source, data = network(folder, "cifar10_resnet20", "cifar10_resnet20", "cifar10/train.npz")
    budget = Budget(macs=0.28)
    result = compress(source.model, torch.zeros(1, 3, 32, 32), decomposition="cp3", budget=budget, calibration="none")
    data = data.take(range(STEPS * BATCH))
    chosen = fine_tune(result.model, data, teacher=source.model, training=Training(epochs=1)).precision
    pairs = []
    for turn in range(ROUNDS + 1):
        speeds = plain(result.model, source.model, data), ours(result, source.model, data, chosen)
        if turn:
            pairs.append(speeds)
    ratios = [round(fast / slow, 3) for slow, fast in pairs]
    write(
        [
            record(
                model="cifar10_resnet20, cp3, 28 % of MACs",
                precision=chosen,
                plain_images_per_second=round(statistics.median(slow for slow, _ in pairs), 1),
                images_per_second=round(statistics.median(fast for _, fast in pairs), 1),
                ratios=ratios,
                median_ratio=statistics.median(ratios),
            )
        ]
    )


if __name__ == "__main__":
    main()
