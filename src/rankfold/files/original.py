"""The original of a saved model: the network it was made from, built anew, with the weights it had."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from rankfold.errors import ArtifactError, DataError, ModelError
from rankfold.files.artifact import digest
from rankfold.plan import Plan
from rankfold.sources.models import Source, build_model, load_weights_


def rebuild(plan: Plan, directory: str | Path) -> tuple[Source, tuple[int, ...] | None]:
    """The original network, built anew, and the shape of one input; None where it takes several."""
    if "model" not in plan.source:
        raise ArtifactError(
            f"{directory} does not say which MODEL it was made from; save it by `rankfold compress`, or load it in "
            "Python with rankfold.load"
        )
    source = build_model(plan.source["model"], seed=int(plan.source.get("seed", 0)))
    shape = plan.source.get("input_shape")
    return source, None if shape is None else tuple(shape)


def one_input(shape: tuple[int, ...] | None, data: str) -> tuple[int, ...]:
    """The shape of one input, for data; raises DataError for a network that takes several."""
    if shape is None:
        raise DataError(f"{data} holds one input per example, and this model takes several; use the Python interface")
    return shape


def load_original_(model: nn.Module, plan: Plan, weights: str | Path | None, *, needed: bool = True) -> None:
    """Gives the original its weights; raises ModelError where they are gone or not the ones compressed.

    Unless they are `needed` it then keeps those that it has.
    """
    recorded = plan.source.get("weights")
    path = weights or recorded
    if path is None or not (needed or Path(path).is_file()):
        return  # compressed as the seed initialised it, and rebuilt so
    if not Path(path).is_file():
        raise ModelError(f"the original's weights {path} do not exist; say where they are with --weights")
    if digest(Path(path)) != plan.source.get("weights_sha256"):
        raise ModelError(f"{path} is not the file that was compressed (its checksum differs); give that with --weights")
    load_weights_(model, path)
