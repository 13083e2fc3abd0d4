"""ResNet-20 on CIFAR-10 at half the MACs, every decomposition: weights alone, no calibration, no fine-tuning.

The 9,980 test images; exact search on the squared relative Frobenius error.
"""

from __future__ import annotations

import torch
from common import network, parser, record, require_data, write

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
        result = compress(source.model, example, decomposition=name, budget=Budget(macs=0.5))
        scored = accuracy(result.model, dataset)
        before, after = latency((source.model, result.model), batch)
        kept = result.after.kept(result.before)
        records.append(
            record(
                model="cifar10_resnet20",
                data="CIFAR-10 test",
                examples=scored.examples,
                method=f"{name}, exact search, Frobenius, no data",
                top1=round(scored.top1, 2),
                base_top1=round(base.top1, 2),
                macs_kept=round(kept["macs"], 4),
                params_kept=round(kept["params"], 4),
                seconds=round(result.seconds, 2),
                latency_ratio_batch64=round(after / before, 3),
                objective=result.plan.settings["objective"],
                bound=result.plan.settings["bound"],
                error_reached=sum(layer.error for layer in result.plan.layers),
            )
        )
    write(records)


if __name__ == "__main__":
    main()
