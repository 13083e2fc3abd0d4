"""How far the continuous search is from the proven bound, and its time beside that of the factorisations.

Separable reconstruction error, budgets of 70, 50 and 30 % of the MACs. ResNet-20 has real weights where the data folder
is given, the others are randomly initialised: the shapes are what counts here.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import network, parser, posed, record, write

from rankfold import Budget
from rankfold.network.surgery import apply_plan
from rankfold.planning import search_plan
from rankfold.search import SEARCHES, Selection
from rankfold.sources.models import build_model


def main() -> None:
    """Curves once per network and decomposition, then one search per budget, against the exact one's bound."""
    folder = parser(__doc__ or "").parse_args().data
    resnet20 = (
        network(folder, "cifar10_resnet20", "cifar10_resnet20", "cifar10/test.npz")[0]
        if folder
        else build_model("zoo:cifar10_resnet20")
    )
    cases = [
        ("resnet20", resnet20.model, (3, 32, 32), ("svd", "spatial", "tucker", "tt", "cp3", "auto")),
        ("resnet18", build_model("zoo:resnet18").model, (3, 224, 224), ("svd", "spatial", "tucker", "tt")),
        ("mobilenet_v2", build_model("zoo:mobilenet_v2").model, (3, 224, 224), ("svd",)),
    ]
    records = []
    for label, model, shape, names in cases:
        for name in names:
            curves = posed(model, torch.zeros(1, *shape), name)
            for fraction in (0.7, 0.5, 0.3):
                problem = curves(macs=fraction)
                start = time.perf_counter()
                found = SEARCHES["rene"](problem)
                searching = time.perf_counter() - start
                assert found.curves is not None
                fits = sum(len(f) for c in found.curves for f in c.fits.values())
                fits -= sum(len(f) for c in problem.curves for f in c.fits.values())
                settled = replace(problem, curves=found.curves)
                start = time.perf_counter()
                again = SEARCHES["rene"](settled)  # with every chosen candidate fitted: the search alone
                alone = time.perf_counter() - start
                bound = SEARCHES["exact"](settled).bound or 0.0
                start = time.perf_counter()
                chosen = search_plan(
                    curves.curves,
                    curves.layers,
                    curves.before,
                    budget=Budget(macs=fraction),
                    search=partial(_given, found),
                )
                apply_plan(model, chosen.plan, factors=chosen.factors)
                fitting = time.perf_counter() - start
                factorising = curves.seconds + fitting + max(searching - alone, 0.0)
                records.append(
                    record(
                        model=label,
                        decomposition=name,
                        macs=fraction,
                        candidates=sum(len(curve) for curve in problem.curves),
                        objective=found.objective,
                        bound=bound,
                        gap_percent=100 * (found.objective / bound - 1),
                        budget_used=settled.used(found.choices, "macs") / settled.room("macs"),
                        candidates_fitted=fits,
                        seconds_of_search=round(alone, 3),
                        seconds_of_factorisations=round(factorising, 3),
                        search_over_factorisations=alone / factorising,
                    )
                )
                assert again.objective <= found.objective * (1 + 1e-9)
                print(records[-1], flush=True)
    write(records)


def _given(found: Selection, *_: Any) -> Selection:
    """A search whose outcome is known."""
    return found


if __name__ == "__main__":
    main()
