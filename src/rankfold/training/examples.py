"""What a network is trained on, parts of it, and the score on it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import nn

from rankfold.errors import TrainingError
from rankfold.evaluation import accuracy, perplexity
from rankfold.network.passes import evaluating, output_of
from rankfold.progress import Progress, silent
from rankfold.sources.data import Dataset
from rankfold.sources.text import TextData

Examples = Dataset | TextData
"""What a network is trained on: labelled inputs, or blocks of a text, whose labels are the next tokens."""

BATCH = 50
"""Examples in a pass."""

Part = TypeVar("Part", bound=Examples)


def split(data: Part, held_out: int, seed: int = 0) -> tuple[Part, Part]:
    """The data without `held_out` random examples, and those; raises TrainingError where too few would be left."""
    if not 0 < held_out < len(data):
        raise TrainingError(f"{held_out} of {len(data)} examples cannot be held out; take fewer, but at least one")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    return cast(Part, data.take(sorted(order[held_out:]))), cast(Part, data.take(sorted(order[:held_out])))


def decided(data: Examples | None, model: nn.Module) -> Examples | None:
    """The same inputs with the classes that a model puts first as their labels: top-1 on them is agreement with it.

    Blocks of text stay as they are. Raises TrainingError for a model that does not give a row of logits per input.
    """
    if not isinstance(data, Dataset):
        return data
    device, dtype = next((p.device, p.dtype) for p in model.parameters() if p.is_floating_point())
    found = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(data), BATCH):
            x, _ = data.batch(start, start + BATCH)
            logits = output_of(model(x.to(device, dtype)))
            if logits.ndim != 2:
                raise TrainingError(
                    "the teacher's output is not a row of logits per input; hold nothing out, without patience"
                )
            found.append(logits.argmax(-1).cpu())
    return replace(data, y=torch.cat(found).numpy())


def score_of(model: nn.Module, data: Examples, *, progress: Progress = silent, what: str = "scoring") -> float:
    """Top-1 in percent on labelled inputs; of text the perplexity."""
    if isinstance(data, TextData):
        return perplexity(model, data.rows, progress=progress, what=what).value
    return accuracy(model, data, progress=progress, what=what).top1
