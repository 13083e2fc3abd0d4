"""The settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from rankfold.errors import TrainingError
from rankfold.network.passes import Inputs
from rankfold.network.precision import multiplies_bfloat16
from rankfold.training.augment import augmentation, is_images

OPTIMISERS = ("sgd", "adamw")
PRECISIONS = ("auto", "no", "bf16")


@dataclass(frozen=True)
class Training:
    """How to fine-tune.

    `batch_size` is that of all processes together; the last, smaller batch of an epoch is left out. `rate` is the
    learning rate after a linear warm-up of `warmup` steps, a tenth of all at most, from which it falls to zero along a
    cosine. `damping` is how far the terms of CP layers are kept from cancelling, before training, and `scaled` says
    whether SGD steps along the gradients of the weights that factors stand for, see `rankfold.training.geometry`; both
    need the plan. `clip` limits the norm of the gradient, for scaled gradients that of the weights' gradients,
    projected. `ema` is the decay per step of an average of the weights, which is the result; zero: the weights
    themselves. `cutmix` is the share of the batches in which a box of every image is that of another, which labels have
    no part in. `as_evaluated` trains the network as it is evaluated: with the statistics that batch norms hold, and
    without dropout. `precision` is that of the passes; "auto" takes bfloat16 where a trial shows it is faster.
    `minutes` is how long a checkpoint may be old, besides the one of every epoch. With a `patience`, training stops
    after so many epochs that score no better on what is held out, and the weights are those of the best.
    """

    epochs: int = 30
    batch_size: int = 128
    optimiser: str = "sgd"
    rate: float = 0.003
    warmup: int = 200
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 20.0
    damping: float = 3e-4
    scaled: bool = True
    ema: float = 0.0
    augment: str = "none"
    cutmix: float = 0.0
    as_evaluated: bool = False
    precision: str = "auto"
    channels_last: bool = True
    compiled: bool = False
    minutes: float = 10.0
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("optimiser", OPTIMISERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise TrainingError(f"{name} {getattr(self, name)!r} is unknown; allowed: {', '.join(allowed)}")
        positive = {"epochs": self.epochs, "batch_size": self.batch_size, "rate": self.rate, "minutes": self.minutes}
        for name, value in positive.items():
            if value <= 0:
                raise TrainingError(f"{name} {value} must be positive")
        if self.patience < 0:
            raise TrainingError(f"patience {self.patience} is a number of epochs, 0 for all of them")
        for name in ("damping", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TrainingError(f"{name} {getattr(self, name)} must be zero, for none, or positive")
        if not 0 <= self.ema < 1:
            raise TrainingError(f"ema {self.ema} is a decay per step, from 0 to below 1, for example 0.999")
        if not 0 <= self.cutmix <= 1:
            raise TrainingError(f"cutmix {self.cutmix} is a share of the batches, from 0 to 1")
        augmentation(self.augment)

    @property
    def changes_images(self) -> bool:
        """Whether inputs, which are images, are changed before the network sees them."""
        return self.augment != "none" or self.cutmix > 0

    @property
    def steps_of_weights(self) -> bool:
        """Whether the gradients of factors are scaled."""
        return self.scaled and self.optimiser == "sgd"


DISTILLING: dict[str, Any] = {
    "optimiser": "adamw",
    "weight_decay": 0.0,
}
"""What is usual where the original on few inputs is all that is learned from."""
DISTILLING_IMAGES: dict[str, Any] = {
    "batch_size": 20,
    "rate": 1e-3,
    "damping": 0.0,
    "ema": 0.98,
    "cutmix": 0.5,
    "as_evaluated": True,
    "precision": "no",  # what a trial would choose may differ from run to run
}
"""The same for images: docs/calibration.md has what was measured."""
DISTILLING_OTHERS: dict[str, Any] = {"batch_size": 1, "rate": 1e-4}
"""The same for what is no image, such as blocks of text: docs/language.md has what was measured."""
SMALL = 64
"""Largest side of an image that is padded and cropped; larger ones are cropped and resized."""
TEXT: dict[str, Any] = {"batch_size": 4, "optimiser": "adamw", "rate": 1e-4}
"""What is usual for blocks of text, unless said otherwise: docs/language.md has what was measured."""


def distilling(given: int | Training, batches: Iterable[Inputs], device: torch.device) -> Training:
    """The settings of a distillation on calibration inputs: those given, or what is usual for so many epochs there."""
    if isinstance(given, Training):
        return given
    first = next(iter(batches))
    if not is_images(first):
        precision = "bf16" if multiplies_bfloat16(device) else "no"
        return Training(epochs=given, patience=given, precision=precision, **DISTILLING, **DISTILLING_OTHERS)
    augment = "cifar" if max(first.shape[2:]) <= SMALL else "imagenet"
    return Training(epochs=given, augment=augment, patience=given, **DISTILLING, **DISTILLING_IMAGES)


def rate_at(training: Training, step: int, total: int) -> float:
    """The learning rate of a step: a linear rise over the warm-up, then a cosine to zero."""
    warmup = min(training.warmup, max(total // 10, 1))
    if step < warmup:
        return training.rate * (step + 1) / warmup
    return 0.5 * training.rate * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def seed_at(training: Training, stream: int, count: int) -> int:
    """A seed of its own for every count of every stream of random numbers."""
    return (training.seed * 1_000_003 + stream) * 10_000_019 + count
