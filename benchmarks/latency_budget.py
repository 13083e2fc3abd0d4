"""Latency as a budget: times predicted against times measured, and accuracy within a limit, beside plans under MACs.

A case MODEL:DECOMPOSITIONS:LIMIT:BATCH is a plan within a share of the original's time, with :compiled that of what
`torch.compile` makes of both. Its record holds what was predicted and measured of the first plan and the last, before
any fit. With `--accuracy` the network is fitted on 500 images and scored, beside the one of most MACs whose plan was
measured to keep the limit as well (in steps of 5 %).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from common import keep, parser, record, require_data
from units import images, language, opened

from rankfold import Budget, Study, study
from rankfold.evaluation import accuracy, latency
from rankfold.network.rehearsal import rehearsed
from rankfold.planning import Found, Task, feasible_plan, placed
from rankfold.progress import silent
from rankfold.punctual import punctual_plan
from rankfold.sources.models import build_model

NETWORKS = (
    "resnet18:svd,interpolative:0.7",
    "resnet50:svd,interpolative:0.7",
    "mobilenet_v2:interpolative:0.7",
    "cifar10_resnet20:svd,interpolative:0.85",
    "smollm2:interpolative:0.7",
)
CASES = (
    *(f"{network}:{batch}" for network in NETWORKS for batch in (1, 16)),
    "resnet18:svd,interpolative:0.7:1:compiled",
    "cifar10_resnet20:svd,interpolative:0.85:16:compiled",
)
FEW = 32
"""Images that layers are measured on where only times matter."""
SECONDS = 6.0
ROUNDS = 300


def task(measured: Study, budget: Budget) -> Task:
    """What a study's plan is sought for."""
    search = placed(measured.search, measured.whole.model)
    return Task(
        measured.model,
        measured.inputs,
        measured.whole,
        budget,
        search,
        measured.before,
        measured.whole_choice,
        measured.compiled,
    )


def planned(measured: Study, budget: Budget) -> Found:
    """A study's plan within another budget, with nothing fitted."""
    within = punctual_plan if "latency" in budget.given else feasible_plan
    return within(task(measured, budget), measured.layers, measured.curves, measured.widths)


def timed(measured: Study, found: Found) -> tuple[float, float]:
    """Milliseconds of the original and of what a plan makes of it."""
    before, after = latency(
        (measured.model, rehearsed(measured.model, found.plan)),
        measured.inputs,
        rounds=ROUNDS,
        seconds=SECONDS,
        compiled=measured.compiled,
    )
    return before, after


def started(folder: Path, case: str, text: Path | None, count: int, budget: Budget) -> tuple[Study, Any]:
    """What is measured of a case's network for a kind of budget, and what it is scored on."""
    name, decomposition, _, batch, *form = case.split(":")
    scored: Any = None
    batches: Any
    if name == "smollm2":
        assert text is not None
        model, batches, _ = language(text, folder / "wikitext2", 8)
        example: Any = {"input_ids": batches[0]["input_ids"][:1, :128].repeat(int(batch), 1), "use_cache": False}
    else:
        source = (
            build_model("torchvision:resnet18") if name == "resnet18" else opened(folder, name)
        )  # no weights are at hand, and times need none
        model = source.model.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
        scored, batches = images(folder, name, count)
        example = batches[0][:1].repeat(int(batch), 1, 1, 1).contiguous(memory_format=torch.channels_last)
    return (
        study(
            cast(Any, torch.compile(model)) if form else model,
            example,
            decomposition=decomposition.split(","),
            budget=budget,
            calibration=batches,
        ),
        scored,
    )


def predicted(folder: Path, case: str, text: Path | None) -> dict[str, Any]:
    """How far what is predicted is from what is measured."""
    name, decomposition, limit, batch, *form = case.split(":")
    measured, _ = started(folder, case, text, FEW, Budget(latency=float(limit)))
    found = planned(measured, measured.budget)
    turns = found.plan.settings["latency_turns_ms"]
    before, after = timed(measured, found)
    return record(
        case=case,
        model=name,
        method=decomposition,
        batch=int(batch),
        compiled=bool(form),
        limit=float(limit),
        original_ms=round(before, 3),
        turns_ms=turns,
        first_off=round(turns[0][0] / turns[0][1] - 1, 3),
        last_off=round(turns[-1][0] / turns[-1][1] - 1, 3),
        time_kept=round(after / before, 3),
        macs_kept=round(found.plan.after.macs / found.plan.before.macs, 3),
        study_seconds=round(measured.seconds, 1),
    )


def scored(folder: Path, case: str, count: int) -> list[dict[str, Any]]:
    """Accuracy within a limit on the latency, and that of the plan of most MACs that keeps it too."""
    name, decomposition, limit, batch = case.split(":")
    records = []
    for unit in ("latency", "macs"):
        measured, data = started(
            folder, f"{name}:{decomposition}:{limit}:{batch}", None, count, Budget.parse([f"{unit}=0.7"])
        )
        budget = Budget(latency=float(limit)) if unit == "latency" else _largest(measured, float(limit))
        result = measured.compress(budget, progress=silent)
        base, reached = accuracy(measured.model, data), accuracy(result.model, data)
        before, after = latency((measured.model, result.model), measured.inputs, rounds=ROUNDS, seconds=SECONDS)
        records.append(
            record(
                case=f"{case}:{unit}",
                model=name,
                method=decomposition,
                batch=int(batch),
                limit=float(limit),
                budget=str(budget),
                data="ImageNet validation",
                calibration_images=count,
                top1=round(reached.top1, 2),
                lost=round(base.top1 - reached.top1, 2),
                examples=reached.examples,
                time_kept=round(after / before, 3),
                original_ms=round(before, 2),
                macs_kept=round(result.after.macs / result.before.macs, 4),
                seconds=round(result.seconds, 1),
            )
        )
        keep(records[-1:])
    return records


def _largest(measured: Study, limit: float) -> Budget:
    """The largest share of the MACs, in steps of 5 %, whose plan is measured to keep a limit on the time."""
    for percent in range(90, 5, -5):
        budget = Budget(macs=percent / 100)
        before, after = timed(measured, planned(measured, budget))
        print(f"  macs={percent / 100}: {after / before:.3f} of the time", flush=True)
        if after <= limit * before:
            return budget
    raise SystemExit(f"no share of the MACs keeps {limit} of the time")


def main() -> None:
    """All cases, or some; each is written down once it is done."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", action="append", help="MODEL:DECOMPOSITIONS:LIMIT:BATCH (repeatable)")
    arguments.add_argument("--accuracy", action="store_true", help="fit and score, beside a plan under MACs")
    arguments.add_argument("--images", type=int, default=500, help="calibration images, with --accuracy")
    arguments.add_argument("--language", type=Path, help="folder of the language model")
    given = arguments.parse_args()
    folder = require_data(given)
    for case in given.only or CASES:
        if given.accuracy:
            scored(folder, case, given.images)
        elif not case.startswith("smollm2") or given.language:
            keep([predicted(folder, case, given.language)])


if __name__ == "__main__":
    main()
