"""Why Tucker and tensor-train ranks are balanced, and their closed form left alone: accuracy against error.

ResNet-20 and ResNet-32 on CIFAR-10 at 70, 60 and 50 % of the MACs, every eighth test image (1,248). Balanced or free
ranks; the closed form, or twenty sweeps of alternating least squares after it.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from common import accuracy_record, network, parser, require_data, write

from rankfold import Budget, compress
from rankfold.decompositions import DECOMPOSITIONS
from rankfold.evaluation import accuracy


def main() -> None:
    """Compresses with each choice, scores and records."""
    folder = require_data(parser(__doc__ or "").parse_args())
    records = []
    for model in ("cifar10_resnet20", "cifar10_resnet32"):
        source, dataset = network(folder, model, model, "cifar10/test.npz")
        assert isinstance(dataset.x, np.ndarray)
        sample = replace(dataset, x=dataset.x[::8], y=dataset.y[::8])
        base = accuracy(source.model, sample)
        for name, balanced, sweeps in itertools.product(("tucker", "tt"), (True, False), (0, 20)):
            chosen = replace(DECOMPOSITIONS[name], balanced=balanced, sweeps=sweeps)
            for budget in (0.7, 0.6, 0.5):
                with mock.patch.dict(DECOMPOSITIONS, {name: chosen}):
                    result = compress(
                        source.model,
                        torch.zeros(1, 3, 32, 32),
                        decomposition=name,
                        budget=Budget(macs=budget),
                        calibration="none",
                    )
                scored = accuracy(result.model, sample)
                ranks, fit = ("balanced" if balanced else "free"), ("closed form" if not sweeps else "ALS")
                method, data = f"{name}, {ranks} ranks, {fit}", "CIFAR-10 test, every eighth"
                records.append(accuracy_record(method, result, scored, base, model=model, data=data))
    write(records)


if __name__ == "__main__":
    main()
