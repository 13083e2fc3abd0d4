"""Alternating against simultaneous updates, as published and with nested factors (masks), five seeds each.

ResNet-20's 18 block convolutions, `tucker` with tied ranks, gradients clipped at 5, data-free. The objective is the sum
of squared relative errors that the ranks found leave; it falls with the MACs kept, so both are given.
"""

from __future__ import annotations

import numpy as np
import torch
from common import network, parser, posed, record, require_data, write

from rankfold.search import Rene
from rankfold.search.published import Published


def main() -> None:
    """Four forms, five seeds, and the budgeted form at each one's mean MACs."""
    folder = require_data(parser(__doc__ or "").parse_args())
    source, _ = network(folder, "cifar10_resnet20", "cifar10_resnet20", "cifar10/test.npz")
    curves = posed(source.model, torch.zeros(1, 3, 32, 32), "tucker", include=["layer*"])
    records = []
    for nested in (False, True):
        for alternate in (True, False):
            objectives, kept, ranks, losses = [], [], [], []
            for seed in range(5):
                found = Published(clip=5.0, nested=nested, alternate=alternate, seed=seed, spread=0.01)(
                    curves(macs=1.0)
                )
                assert found.curves is not None
                assert found.trace is not None
                last = found.trace.steps[-1]
                ranks.append([int(one.split()[1]) for one in last.likeliest])
                losses.append(last.losses["weights"])
                objectives.append(found.objective)
                used = sum(int(c.costs["macs"][k]) for c, k in zip(found.curves, found.choices, strict=True))
                kept.append((used + curves(macs=1.0).fixed.macs) / curves.before.macs)
            same = Rene()(curves(macs=min(float(np.mean(kept)), 1.0)))
            records.append(
                record(
                    factors="nested (masks)" if nested else "separate, as published",
                    updates="alternating" if alternate else "simultaneous",
                    seeds=5,
                    objective_mean=float(np.mean(objectives)),
                    objective_spread=float(np.std(objectives)),
                    macs_kept_mean=float(np.mean(kept)),
                    macs_kept_spread=float(np.std(kept)),
                    last_weight_loss_mean=float(np.mean(losses)),
                    last_weight_loss_spread=float(np.std(losses)),
                    rank_spread_mean=float(np.std(ranks, axis=0).mean()),
                    budgeted_objective_at_mean_macs=same.objective,
                )
            )
            print(records[-1], flush=True)
    write(records)


if __name__ == "__main__":
    main()
