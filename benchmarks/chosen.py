"""Which decompositions an exact search chooses when it may take any: layers by decomposition, at five budgets.

Calibrated on 128 unlabelled inputs. Beside it the time of the study, and of one with `auto`, which leaves some out.
`--only MODEL:UNIT` runs some cases, a unit being macs or params.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import keep, parser, record, require_data
from default import opened_with_inputs

from rankfold import Budget, BudgetError, study
from rankfold.planning import EVERY

CASES = tuple(
    f"{name}:{unit}"
    for name in ("mnist_lenet", "cifar10_resnet20", "cifar10_resnet32", "resnet50")
    for unit in ("macs", "params")
)
BUDGETS = (0.7, 0.5, 0.35, 0.2, 0.1)


def main() -> None:
    """All cases, or some; each is written down once it is done."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", action="append", help="MODEL:UNIT (repeatable)")
    given = arguments.parse_args()
    folder = require_data(given)
    for case in given.only or CASES:
        keep([_counted(folder, case)])


def _counted(folder: Path, case: str) -> dict[str, Any]:
    """The record of a network and what is limited."""
    name, unit = case.split(":")
    model, _, batches = opened_with_inputs(folder, name)
    every, auto = (
        study(
            model,
            batches[0][:1],
            decomposition=names,
            budget=_limit(unit, BUDGETS[0]),
            calibration=batches,
            sequential=False,
        )
        for names in (EVERY, "auto")
    )
    counts: Counter[str] = Counter()
    for kept in BUDGETS:
        with suppress(BudgetError):
            plan = every.compress(_limit(unit, kept)).plan
            counts.update(layer.decomposition or "none" for layer in plan.layers)
    return record(
        case=case,
        model=name,
        unit=unit,
        layers=dict(counts),
        seconds_all=round(every.seconds, 1),
        seconds_auto=round(auto.seconds, 1),
    )


def _limit(unit: str, kept: float) -> Budget:
    return Budget(macs=kept) if unit == "macs" else Budget(params=kept)


if __name__ == "__main__":
    main()
