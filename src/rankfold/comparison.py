"""A saved model against its original: accuracy on labelled data, size, and latency in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rankfold.artifact import digest, load, load_plan
from rankfold.budget import Cost
from rankfold.data import Normalisation, open_dataset
from rankfold.errors import ArtifactError, ModelError
from rankfold.evaluation import Accuracy, accuracy, latency
from rankfold.models import Source, build_model, load_weights_
from rankfold.plan import Plan
from rankfold.progress import Progress, silent


@dataclass(frozen=True)
class Side:
    """One of the two networks: its accuracy (None: not scored), cost, and median latency of a batch of one."""

    accuracy: Accuracy | None
    cost: Cost
    latency_ms: float

    def as_dict(self) -> dict[str, Any]:
        """The side in JSON's types, accuracies in percent."""
        top = (
            {"top1": self.accuracy.top1, "top5": self.accuracy.top5} if self.accuracy else {"top1": None, "top5": None}
        )
        return {**top, **vars(self.cost), "latency_ms": self.latency_ms}


@dataclass(frozen=True)
class Comparison:
    """Original and compressed network, side by side."""

    examples: int
    original: Side
    compressed: Side
    normalisation: Normalisation

    def as_dict(self) -> dict[str, Any]:
        """The comparison in JSON's types."""
        return {
            "examples": self.examples,
            "original": self.original.as_dict(),
            "compressed": self.compressed.as_dict(),
            "normalisation": asdict(self.normalisation),
        }


def compare(
    directory: str | Path,
    data: str,
    *,
    original: bool = False,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 250,
    progress: Progress = silent,
) -> Comparison:
    """Scores the model saved in `directory` on `data`, and times it and its original in turns.

    The original is built as it was for compression; it is scored only where `original` is set, with the weights it had
    then, or those in `weights`. Normalisation is the model's own unless `mean` and `std` are given.
    """
    plan = load_plan(directory)
    source, shape = rebuild(plan, directory)
    student = load(directory, source.model)
    normalisation = source.normalised_by(shape[0], mean, std)
    dataset = open_dataset(data, shape, normalisation, normalise_floats=mean is not None or std is not None)
    if original:
        load_original_(source.model, plan, weights)
    source.model.to(next(p.dtype for p in student.parameters() if p.is_floating_point()))
    dense_ms, student_ms = latency((source.model, student), source.example(shape))
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    base = accuracy(source.model, dataset, what="scoring the original", **options) if original else None
    scored = accuracy(student, dataset, what="scoring the compressed model", **options)
    return Comparison(
        len(dataset), Side(base, plan.before, dense_ms), Side(scored, plan.after, student_ms), normalisation
    )


def rebuild(plan: Plan, directory: str | Path) -> tuple[Source, tuple[int, ...]]:
    """The original network, built anew, and the shape of one input."""
    if "model" not in plan.source or "input_shape" not in plan.source:
        raise ArtifactError(
            f"{directory} does not say which MODEL it was made from; save it by `rankfold compress`, or load it in "
            "Python with rankfold.load"
        )
    source = build_model(plan.source["model"], seed=int(plan.source.get("seed", 0)))
    return source, tuple(plan.source["input_shape"])


def load_original_(model: nn.Module, plan: Plan, weights: str | Path | None) -> None:
    """Gives the original its weights; raises ModelError where they are gone or not the ones compressed."""
    recorded = plan.source.get("weights")
    path = weights or recorded
    if path is None:
        return  # compressed as the seed initialised it, and rebuilt so
    if not Path(path).is_file():
        raise ModelError(f"the original's weights {path} do not exist; say where they are with --weights")
    if digest(Path(path)) != plan.source.get("weights_sha256"):
        raise ModelError(f"{path} is not the file that was compressed (its checksum differs); give that with --weights")
    load_weights_(model, path)
