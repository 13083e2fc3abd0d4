"""What the published search's γ, β, step s and factor f decide, and what the budgeted form's one setting does.

Two networks: ResNet-20 (`tucker`, the 18 block convolutions, every fifth test image) and LeNet (`tucker`, all layers,
every fifth test image). Published, data-free; one setting moves at a time from γ 0.4, β 0.8, s 10, f 10.
The budgeted form has no such constants: it is run at half the MACs with 4 to 64 iterations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from common import network, parser, posed, record, require_data, write

from rankfold import Budget, SearchError
from rankfold.evaluation import accuracy
from rankfold.network.surgery import apply_plan
from rankfold.planning import search_plan
from rankfold.search import SEARCHES, Rene, Search
from rankfold.search.published import CIFAR, Published
from rankfold.sources.data import Dataset

BASE = Published()
CLIPPED = replace(BASE, clip=5.0)
GRID = {
    "as published": BASE,
    "gamma 0.1": replace(BASE, gamma=0.1),
    "gamma 1.6": replace(BASE, gamma=1.6),
    "beta 0.4": replace(BASE, beta=0.4),
    "beta 1.6": replace(BASE, beta=1.6),
    "clipped at 5": CLIPPED,
    "clipped, gamma 0.1": replace(CLIPPED, gamma=0.1),
    "clipped, beta 1.6": replace(CLIPPED, beta=1.6),
    "clipped, s 5, f 5": replace(CLIPPED, schedule=replace(CIFAR, step=5, factor=5)),
    "clipped, s 20, f 4": replace(CLIPPED, schedule=replace(CIFAR, step=20, factor=4)),
    "clipped, s 30, f 30": replace(CLIPPED, schedule=replace(CIFAR, step=30, factor=30)),
}


def main() -> None:
    """Every setting on both networks."""
    folder = require_data(parser(__doc__ or "").parse_args())
    records: list[dict[str, Any]] = []
    for model, shape, data, include in (
        ("cifar10_resnet20", (3, 32, 32), "cifar10/test.npz", ["layer*"]),
        ("mnist_lenet", (1, 28, 28), "mnist/test.npz", None),
    ):
        source, dataset = network(folder, model, model, data)
        fifth = dataset.sample(len(dataset) // 5)
        curves = posed(source.model, torch.zeros(1, *shape), "tucker", include=include)

        def score(label: str, search: Search, budget: float, chosen: Any = (source, fifth, curves, model)) -> None:
            origin, examples, have, name = chosen
            found = search_plan(have.curves, have.layers, have.before, budget=Budget(macs=budget), search=search)
            student, plan = apply_plan(origin.model, found.plan, factors=found.factors)
            kept = plan.after.kept(plan.before)
            records.append(
                record(
                    model=name,
                    setting=label,
                    macs_kept=kept["macs"],
                    params_kept=kept["params"],
                    objective=sum(layer.error for layer in plan.layers),
                    top1=round(_top1(student, examples), 2),
                    data="every fifth test image",
                    examples=len(examples),
                )
            )
            print(records[-1], flush=True)

        for label, search in GRID.items():
            try:
                score(label, search, 1.0)
            except SearchError as error:
                records.append(record(model=model, setting=label, failed=str(error)))
        for iterations in (4, 16, 64):
            score(f"budgeted, {iterations} iterations", Rene(iterations=iterations), 0.5)
        score("exact", SEARCHES["exact"], 0.5)
    write(records)


def _top1(model: torch.nn.Module, examples: Dataset) -> float:
    return accuracy(model, examples).top1


if __name__ == "__main__":
    main()
