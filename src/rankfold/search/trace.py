"""The history of a search: what it saw in every iteration, enough to draw how the ranks converge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """One iteration of a search.

    `stage` counts refinements, `iteration` goes on within a stage; `temperature` is that of the softmax over a layer's
    candidates. `losses` are the search's own by name, `costs` the expected costs of the whole network by unit. Per
    layer: the entropy of its distribution in nats, and its likeliest candidate.
    """

    stage: int
    iteration: int
    temperature: float
    losses: Mapping[str, float]
    costs: Mapping[str, float]
    entropy: tuple[float, ...]
    likeliest: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """All steps of a search over the named layers."""

    layers: tuple[str, ...]
    steps: tuple[Step, ...]

    def as_dict(self) -> dict[str, Any]:
        """The trace in JSON's types."""
        return {"layers": list(self.layers), "steps": [asdict(step) for step in self.steps]}


def step_from_dict(entry: Mapping[str, Any]) -> Step:
    """The step that `asdict` wrote."""
    values: dict[str, Any] = {**entry, "entropy": tuple(entry["entropy"]), "likeliest": tuple(entry["likeliest"])}
    return Step(**values)
