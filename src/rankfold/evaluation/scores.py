"""What a model is worth: top-1 and top-5 on labelled inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankfold.errors import DataError, reason_of
from rankfold.network.passes import describe_inputs, evaluating
from rankfold.progress import Progress, silent
from rankfold.sources.data import Dataset

BATCH = 250
"""Examples that go through a network together, at most."""
VALUES = 2**21
"""Values of their inputs: activations of large batches of large images are slower to make room for than to compute."""


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in percent, over `examples` labelled inputs."""

    top1: float
    top5: float
    examples: int


def accuracy(
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int | None = None,
    progress: Progress = silent,
    what: str = "evaluating",
) -> Accuracy:
    """How often the right class is the model's first, and among its first five, on a labelled dataset.

    Batches are of `batch_size`, or else of up to `BATCH` examples with `VALUES` values together. The model must return
    logits of shape (n, classes). Raises DataError where the data do not fit it.
    """
    batch_size = batch_size or max(1, min(BATCH, VALUES // max(math.prod(dataset.input_shape), 1)))
    first = fifth = 0
    device, dtype = next((p.device, p.dtype) for p in model.parameters() if p.is_floating_point())
    with evaluating(model), torch.no_grad():
        for start in range(0, len(dataset), batch_size):
            progress(what, start, len(dataset))
            x, y = dataset.batch(start, start + batch_size)
            logits = _logits(model, x.to(device, dtype), dataset.classes)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()
            hits = best == y[:, None]
            first += int(hits[:, 0].sum())
            fifth += int(hits.any(1).sum())
    progress(what, len(dataset), len(dataset))
    return Accuracy(100 * first / len(dataset), 100 * fifth / len(dataset), len(dataset))


def _logits(model: nn.Module, x: Tensor, classes: int) -> Tensor:
    try:
        logits = model(x)
    except Exception as error:
        raise DataError(f"the model does not take inputs {describe_inputs(x)}: {reason_of(error)}") from error
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise DataError("the model's output is not one row of logits per input; evaluate it with code of your own")
    if classes > logits.shape[1]:
        raise DataError(f"the data have labels up to {classes - 1}, the model has {logits.shape[1]} classes")
    return logits
