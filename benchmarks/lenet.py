"""LeNet on MNIST: the complete search at three budgets on its parameters, accuracy before and after.

All decompositions to choose from; ranks by reconstruction errors, and by the divergence on 512 unlabelled training
images; the 10,000 test images, no fine-tuning.
"""

from __future__ import annotations

import torch
from common import accuracy_record, network, parser, require_data, unlabelled, write

from rankfold import Budget, compress
from rankfold.evaluation import accuracy
from rankfold.objectives import Divergence
from rankfold.search import Rene


def main() -> None:
    """Both objectives at three budgets."""
    folder = require_data(parser(__doc__ or "").parse_args())
    source, dataset = network(folder, "mnist_lenet", "mnist_lenet", "mnist/test.npz")
    base = accuracy(source.model, dataset)
    divergence = Divergence(source.model, unlabelled(folder, source, "mnist/train.npz"))
    records = []
    for fraction in (0.3, 0.1, 0.05):
        for label, search in (("separable", Rene()), ("end to end", Rene(objective=divergence))):
            result = compress(
                source.model,
                torch.zeros(1, 1, 28, 28),
                decomposition="auto",
                budget=Budget(params=fraction),
                calibration="none",
                search=search,
            )
            method = f"auto, rene, {label}, {100 * fraction:.0f} % of the parameters"
            scored = accuracy(result.model, dataset)
            records.append(accuracy_record(method, result, scored, base, model="mnist_lenet", data="MNIST test"))
            print(records[-1], flush=True)
    write(records)


if __name__ == "__main__":
    main()
