"""What a training run tells of itself: epoch by epoch, and at its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Epoch:
    """An epoch in numbers: its mean loss, and on held-out examples the share of right answers, in percent, of text the
    perplexity, or of inputs without labels the divergence from the teacher.
    """

    loss: float
    top1: float | None
    seconds: float
    perplexity: float | None = None
    divergence: float | None = None


@dataclass(frozen=True)
class Trained:
    """The fine-tuned network, its history, the precision that was taken, and the step an earlier run had come to.

    `started` is the score on held-out examples before the first step, where there is a patience. `main` says whether
    this process is the one that is to write and report, of those that trained together.
    """

    model: nn.Module
    epochs: tuple[Epoch, ...]
    precision: str
    resumed_at: int = 0
    main: bool = True
    started: float | None = None


@dataclass
class Progressed:
    """Where a run is: how many steps are behind it, and what they were like."""

    step: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    loss_sum: float = 0.0
    seconds: float = 0.0
    started: float | None = None
