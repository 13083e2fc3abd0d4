"""What the options of `compress` describe: what it is calibrated on, how ranks are searched, and how it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.cli.options import BLOCKS_IN_BATCH, examples
from rankfold.errors import BudgetError, DataError

if TYPE_CHECKING:
    from rankfold.search import Search
    from rankfold.sources.models import Source
    from rankfold.training import Training

BLOCKS = 128
"""Blocks of text to calibrate on, unless said otherwise."""
OBJECTIVES = ("reconstruction", "divergence", "validation")


def training_of(
    finetune: str | None, test: str | None, source: Source, shape: tuple[int, ...] | None, length: int, **settings: Any
) -> Training | None:
    """The settings of fine-tuning, if that is asked for; its data are looked at now, not after the compression."""
    if finetune is None:
        if test is not None:
            raise DataError("--test is for --finetune; score a model that is only compressed with evaluate")
        return None
    from rankfold.fine_tuning import open_examples, synthetic_count
    from rankfold.sources.text import is_text
    from rankfold.training import Training
    from rankfold.training.settings import TEXT

    for spec in (finetune if synthetic_count(finetune) is None else None, test):
        if spec is not None:
            open_examples(spec, source, shape, length)
    return Training(**{**(TEXT if is_text(finetune) else {}), **settings})


def calibration_of(
    spec: str,
    samples: int | None,
    blocks: tuple[int, float],
    source: Source,
    example: Any,
    shape: tuple[int, ...] | None,
) -> str | list[Any]:
    """What `compress` is to calibrate on: a way to make inputs, by name, or batches of data.

    Of `blocks` of text, their length and the share of them that the model writes.
    """
    from rankfold.calibration.synthetic import SAMPLES
    from rankfold.calibration.tokens import with_written
    from rankfold.sources.text import is_text, open_text

    length, written = blocks
    if written and not is_text(spec):
        raise DataError(f"--written is for --calibration text:FILE, not {spec}; synthetic has the model write all")
    if spec in ("auto", "none", "synthetic"):
        return spec
    if is_text(spec):
        rows = open_text(spec, source.tokenize, length, samples or BLOCKS).rows
        others = [name for name in example if not name.endswith("input_ids")] if isinstance(example, dict) else []
        if others:
            raise DataError(f"{spec} holds tokens, and this model takes {', '.join(others)} as well; use Python")
        parts = with_written(source.model, rows, written).split(BLOCKS_IN_BATCH)
        return [dict.fromkeys(example, part) if isinstance(example, dict) else part for part in parts]
    return [x for x, _ in examples(spec, samples or SAMPLES, source, shape)]


def search_of(
    name: str,
    objective: str,
    source: Source,
    shape: tuple[int, ...] | None,
    *,
    data: str | None,
    samples: int,
    checkpoint: Path | None,
) -> str | Search:
    """The search that the options of compress describe."""
    from rankfold.errors import UnknownNameError
    from rankfold.objectives import Divergence, Validation
    from rankfold.search import Rene

    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    if name != "rene":
        if objective != OBJECTIVES[0] or checkpoint:
            raise BudgetError(f"--objective and --checkpoint are for --search rene, not {name}")
        return name
    if objective == OBJECTIVES[0]:
        if data is not None:
            raise BudgetError("--data is for --objective divergence or validation")
        return Rene(checkpoint=checkpoint)
    if data is None:
        raise DataError(f"--objective {objective} needs inputs; give them with --data, for example npz:train.npz")
    pairs = list(examples(data, samples, source, shape))
    if objective == "validation":
        return Rene(objective=Validation(source.model, pairs), checkpoint=checkpoint)
    return Rene(objective=Divergence(source.model, [x for x, _ in pairs]), checkpoint=checkpoint)
