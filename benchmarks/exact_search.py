"""The exact search on ResNet-18, every layer, all seven decompositions: seconds, once the error curves are there.

Random weights, 224×224, budgets of 70, 50 and 30 % of the MACs, and two budgets at once.
"""

from __future__ import annotations

import statistics
import time

import torch
from common import record, write

from rankfold import Budget
from rankfold.network.costs import cost_of
from rankfold.network.finding import find_layers
from rankfold.planning import assign, make_plan, measure
from rankfold.sources.models import build_model


def main() -> None:
    """Measures the curves once, pruned for both units together, then searches three times per budget."""
    model = build_model("zoo:resnet18").model
    example = torch.zeros(1, 3, 224, 224)
    before = cost_of(model, example)
    choices, layers = assign(find_layers(model, example), "auto")
    start = time.perf_counter()
    curves = measure(model, layers, choices, units=("macs", "params"))
    measuring = time.perf_counter() - start
    records = []
    for units in (("macs",), ("macs", "params")):
        for fraction in (0.7, 0.5, 0.3):
            budget = Budget.parse([f"{unit}={fraction}" for unit in units])
            times = []
            for _ in range(3):
                start = time.perf_counter()
                plan = make_plan(curves, layers, before, budget=budget)
                times.append(time.perf_counter() - start)
            bound = float(plan.settings["bound"])
            records.append(
                record(
                    model="resnet18, random weights",
                    budget=str(budget),
                    candidates=sum(len(curve) for curve in curves),
                    seconds_of_curves=round(measuring, 1),
                    seconds_of_search=round(statistics.median(times), 2),
                    runs=[round(one, 2) for one in times],
                    objective=plan.settings["objective"],
                    bound=bound,
                    relative_gap=plan.settings["objective"] / bound - 1,
                )
            )
    write(records)


if __name__ == "__main__":
    main()
