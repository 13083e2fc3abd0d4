"""What sum of errors predicts accuracy: relative errors, or what errors of one, two or three sizes cost the output.

Everything is measured once per network; then errors are priced in every way, and each way's plan is fitted layer by
layer and scored. Networks of images: top-1 on test images, 500 (CIFAR-10: 512) unlabelled ones to calibrate on; the
language model: perplexity on 12 evenly spaced blocks of 1,024 tokens of WikiText-2's test text, 128 blocks of 512 of
the validation text to calibrate on. `--only MODEL:DECOMPOSITIONS:KEPT` runs some cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import keep, parser, record, require_data
from torch import Tensor, nn
from units import images, language, opened, sizes

from rankfold import Budget, Study, study
from rankfold.evaluation import accuracy, perplexity
from rankfold.search import prices
from rankfold.search.curves import Price
from rankfold.units import with_prices

CASES = (
    "cifar10_resnet20:svd,interpolative:0.5",
    "cifar10_resnet32:spatial,interpolative:0.4",
    "mobilenet_v2:interpolative:0.8",
    "deit_tiny:svd,interpolative:0.8",
    "smollm2:interpolative:0.7",
)
SUMS: dict[str, tuple[float, ...]] = {
    "relative errors": (),
    "costs at 5 %": (0.05,),
    "costs at 5 and 40 %": (0.05, 0.4),
    "costs at 2, 10 and 50 %": (0.02, 0.1, 0.5),
}
"""Sizes of errors whose costs are measured, by the name of the sum."""


def summed(measured: Study, trials: tuple[float, ...]) -> Study:
    """A study whose errors are priced by trials of other sizes; without any they count as they are."""
    curves = tuple(replace(one, price=Price()) for one in measured.curves)
    widths = tuple(replace(one, price=Price()) for one in measured.widths)
    if trials:
        with patch.object(prices, "TRIALS", trials):
            curves, widths = with_prices(measured.whole.model, curves, widths, measured.known)
    return replace(measured, curves=curves, widths=widths)


def of_images(folder: Path, name: str) -> tuple[nn.Module, Any, list[Tensor], Callable[[nn.Module], float]]:
    """A network, an example, what it is calibrated on, and its top-1 in percent."""
    model: Any = opened(folder, name).model
    model.to(memory_format=torch.channels_last)
    scored, batches = images(folder, name, 500)
    example = torch.zeros(1, *batches[0].shape[1:])
    return model, example, batches, lambda one: round(accuracy(one, scored).top1, 2)


def of_language(folder: Path, text: Path) -> tuple[Any, Any, list[dict[str, Any]], Callable[[nn.Module], float]]:
    """The same of the language model, and its perplexity."""
    model, batches, scored = language(folder, text, 128)
    example = {"input_ids": batches[0]["input_ids"][:1], "use_cache": False}
    return model, example, batches, lambda one: round(perplexity(one, scored).value, 2)


def main() -> None:
    """Writes a record of every sum for every case, or for those asked for."""
    made = parser(__doc__ or "")
    made.add_argument("--language", type=Path, help="folder of the language model")
    made.add_argument("--only", action="append", help="MODEL:DECOMPOSITIONS:KEPT (repeatable)")
    arguments = made.parse_args()
    folder = require_data(arguments)
    for case in arguments.only or CASES:
        name, decomposition, kept = case.split(":")
        text = name == "smollm2"
        found: Any = of_language(arguments.language, folder / "wikitext2") if text else of_images(folder, name)
        model, example, batches, score = found
        budget = Budget(macs=float(kept))
        if text:
            outside, inside = sizes(model)
            budget = Budget(params=int(outside + float(kept) * inside))
        choices = decomposition.split(",")
        measured = study(model, example, decomposition=choices, budget=budget, calibration=batches, sequential=False)
        unit, base = "perplexity" if text else "top1", score(model)
        for way, trials in SUMS.items():
            reached = {unit: score(summed(measured, trials).compress().model), f"base_{unit}": base}
            keep([record(case=f"{case}:{way}", model=name, method=decomposition, kept=float(kept), sum=way, **reached)])


if __name__ == "__main__":
    main()
