"""Stopping early: the weights of the epoch that scored best, and when no better one is hoped for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Stopping:
    """The best of the epochs so far, and how many there were since; with a `patience` of zero nothing is kept."""

    patience: int
    lower: bool
    best: float | None = None
    since: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def see(self, score: float | None, state: Mapping[str, Tensor]) -> None:
        """Takes note of an epoch's score and weights; lower scores are better where `lower` is set."""
        if not self.patience or score is None:
            return
        if self.best is None or math.isnan(self.best) or (score < self.best if self.lower else score > self.best):
            self.best, self.since = score, 0
            self.weights = {name: tensor.detach().clone() for name, tensor in state.items()}
        else:
            self.since += 1

    @property
    def over(self) -> bool:
        """Whether as many epochs as there is patience for were no better."""
        return bool(self.patience) and self.since >= self.patience
