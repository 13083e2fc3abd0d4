"""ResNet-20 on CIFAR-10 at half the MACs, every decomposition: weights alone, no calibration, no fine-tuning.

The 9,980 test images; exact search on the squared relative Frobenius error.
"""

from __future__ import annotations

import torch
from common import accuracy_record, network, parser, require_data, write

from rankfold import Budget, compress
from rankfold.decompositions import DECOMPOSITIONS
from rankfold.evaluation import accuracy, latency


def main() -> None:
    """Compresses, scores and records."""
    source, dataset = network(
        require_data(parser(__doc__ or "").parse_args()), "cifar10_resnet20", "cifar10_resnet20", "cifar10/test.npz"
    )
    example = torch.zeros(1, 3, 32, 32)
    batch = dataset.batch(0, 64)[0]
    base = accuracy(source.model, dataset)
    records = []
    for name in [*DECOMPOSITIONS, "auto"]:
        result = compress(source.model, example, decomposition=name, budget=Budget(macs=0.5), calibration="none")
        scored = accuracy(result.model, dataset)
        before, after = latency((source.model, result.model), batch)
        records.append(
            accuracy_record(
                f"{name}, exact search, Frobenius, no data",
                result,
                scored,
                base,
                model="cifar10_resnet20",
                data="CIFAR-10 test",
                latency_ratio_batch64=round(after / before, 3),
                objective=result.plan.settings["objective"],
                bound=result.plan.settings["bound"],
            )
        )
    write(records)


if __name__ == "__main__":
    main()
