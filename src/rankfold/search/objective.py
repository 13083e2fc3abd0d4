"""What a search makes small: a function of the weights that candidates, or mixtures of them, would give the layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor

from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.search.curves import Curve


class Objective(ABC):
    """A loss over the weights of all layers at once.

    `separable` says that the loss is the sum of the curves' own errors, so that a search needs no weights to know it.
    """

    separable: ClassVar[bool] = False

    @abstractmethod
    def gradient(
        self, curves: Sequence[Curve], weights: Sequence[Tensor], iteration: int
    ) -> tuple[float, tuple[Tensor, ...]]:
        """The loss where the curves' layers have these weights, and its derivative by each of them.

        `weights` are of shape (g, o, i, *taps), like the curves' own. `iteration` counts the calls of a search, for
        objectives that take another batch each time.
        """

    def loss(self, curves: Sequence[Curve], weights: Sequence[Tensor], iteration: int) -> float:
        """The loss alone; the same number as `gradient` gives for the same iteration."""
        return self.gradient(curves, weights, iteration)[0]

    @abstractmethod
    def describe(self) -> str:
        """What is minimised and on what, in a line; equal for equal objectives."""


@dataclass(frozen=True)
class Reconstruction(Objective):
    """The sum over layers of the squared relative error of the weight; needs no data.

    ‖(W − Ŵ) Σ^½‖² / ‖W Σ^½‖², where Σ is the second moment of a layer's input patches. `metric` maps layer names to Σ
    (`rankfold.calibration` measures it); a layer without one is measured by the Frobenius norm. With `relative=False`
    the errors are not divided by the weight's own size, as published.
    """

    metric: Mapping[str, Moment] = field(default_factory=dict)
    relative: bool = True

    @property
    def separable(self) -> bool:  # pyrefly: ignore[bad-override]
        """Whether the curves' own errors are what is minimised."""
        return not self.metric and self.relative

    def gradient(
        self, curves: Sequence[Curve], weights: Sequence[Tensor], iteration: int
    ) -> tuple[float, tuple[Tensor, ...]]:
        total, slopes = 0.0, []
        for curve, weight in zip(curves, weights, strict=True):
            original = cast(Tensor, curve.weight).to(weight.dtype)
            residual = weight - original
            moment = self.metric.get(curve.layer.name, IDENTITY)
            moved = moment.applied(residual)
            scale = 1 / max(float(moment.energy(original)), 1e-300) if self.relative else 1.0
            total += scale * float((moved * residual).sum())
            slopes.append(2 * scale * moved)
        return total, tuple(slopes)

    def describe(self) -> str:
        seen = sum(moment.positions for moment in self.metric.values())
        where = f" in the metric of {len(self.metric)} layers, {seen} patches" if self.metric else ""
        return f"{'relative' if self.relative else 'absolute'} reconstruction error{where}"


def inner(slope: Tensor, direction: Tensor) -> float:
    """The inner product of a derivative with a change of the weight."""
    return float(torch.sum(slope.double() * direction.double()))
