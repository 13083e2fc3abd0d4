"""End to end against separable: ranks by the divergence from the original's outputs, or by reconstruction errors.

ResNet-20, 512 unlabelled training images, every 97th; the 9,980 test images, no fine-tuning; Frobenius factors.
"""

from __future__ import annotations

import torch
from common import accuracy_record, network, parser, require_data, unlabelled, write

from rankfold import Budget, compress
from rankfold.evaluation import accuracy
from rankfold.objectives import Divergence
from rankfold.search import Rene


def main() -> None:
    """Both objectives for two decompositions at two budgets."""
    folder = require_data(parser(__doc__ or "").parse_args())
    source, dataset = network(folder, "cifar10_resnet20", "cifar10_resnet20", "cifar10/test.npz")
    batches = unlabelled(folder, source, "cifar10/train.npz")
    base = accuracy(source.model, dataset)
    divergence = Divergence(source.model, batches)
    records = []
    for name in ("spatial", "tucker"):
        for fraction in (0.5, 0.3):
            for label, search in (("separable", Rene()), ("end to end", Rene(objective=divergence))):
                result = compress(
                    source.model,
                    torch.zeros(1, 3, 32, 32),
                    decomposition=name,
                    budget=Budget(macs=fraction),
                    calibration="none",
                    search=search,
                )
                scored = accuracy(result.model, dataset)
                assert result.trace is not None
                losses = [s.losses["objective"] for s in result.trace.steps if "objective" in s.losses]
                values = {"divergence_first": losses[0], "divergence_last": losses[-1]} if losses else {}
                method = f"{name}, {label}, {100 * fraction:.0f} % of the MACs"
                records.append(
                    accuracy_record(
                        method, result, scored, base, model="cifar10_resnet20", data="CIFAR-10 test", **values
                    )
                )
                print(records[-1], flush=True)
    write(records)


if __name__ == "__main__":
    main()
