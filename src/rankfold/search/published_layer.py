"""A layer in the search as published: candidate ranks with a factor set and a logit each, and the winner's curve.

The search itself, and its symbols, are in `rankfold.search.published`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor

from rankfold.budget import RESOURCES
from rankfold.decompositions import Factors, expand, fit, reconstruct, relative_error, wiring_of
from rankfold.errors import BudgetError
from rankfold.search.curves import Curve


class Layer:
    """A layer in one stage: candidates, their factors, logits."""

    def __init__(self, curve: Curve, ranks: Sequence[int], nested: bool) -> None:
        if len(curve.tried) != 1 or curve.weight is None:
            raise BudgetError(f"{curve.layer.name}: the published search takes a layer's weight and one decomposition")
        (self.method,) = curve.tried
        self.curve, self.shape = curve, curve.layer.shape
        self.wiring = wiring_of(self.method, self.shape)
        self.target = curve.weight.float()
        self.nested = nested
        expansion = expand(self.method, curve.weight, self.shape)
        tied = [most for most in expansion.max_ranks() if most > 1] or [1]
        self.largest = min(tied)
        self._most = expansion.max_ranks()
        self.ranks = tuple(dict.fromkeys(max(1, min(rank, self.largest)) for rank in ranks))
        fitted = [
            fit(self.method, curve.weight, self.shape, self.tied(rank), expansion=expansion) for rank in self.ranks
        ]
        self.factors = [tuple(f.float().contiguous() for f in one) for one in (fitted[-1:] if nested else fitted)]
        self.logits = torch.zeros(len(self.ranks))

    def tied(self, rank: int) -> tuple[int, ...]:
        """The same rank on every bond, as far as the bond takes it."""
        return tuple(min(rank, most) for most in self._most)

    def candidates(self) -> list[Tensor]:
        """The reconstructed weight of every candidate, differentiable in the factors."""
        sets = [self._leading(rank) for rank in self.ranks] if self.nested else self.factors
        return [reconstruct(self.wiring, one) for one in sets]

    def costs(self, unit: str) -> Tensor:
        """What each candidate costs."""
        cost = self.wiring.macs if unit == "macs" else self.wiring.params
        scale = self.curve.layer.itemsize if unit == "bytes" else 1
        return torch.tensor([float(scale * cost(self.shape, self.tied(rank))) for rank in self.ranks])

    @cached_property
    def relative_ranks(self) -> Tensor:
        """r / max R."""
        return torch.tensor([rank / max(self.ranks) for rank in self.ranks])

    def _leading(self, rank: int) -> Factors:
        """The leading parts of the shared factors, as large as a rank takes."""
        sizes = dict(zip(self.wiring.bonds, self.tied(rank), strict=True))
        (whole,) = self.factors
        parts = []
        for letters, factor in zip(self.wiring.factors, whole, strict=True):
            cut = (slice(None), *(slice(sizes.get(axis)) for axis in letters))
            parts.append(factor[cut])
        return tuple(parts)


def with_rank(layer: Layer) -> Curve:
    """A curve of two candidates: the layer as it is, and the likeliest rank with the error its factors reach."""
    spec, ranks = layer.curve.layer, layer.tied(layer.ranks[int(layer.logits.argmax())])
    weight = cast(Tensor, layer.curve.weight)
    factors = fit(layer.method, weight, spec.shape, ranks)
    error = relative_error(weight.double(), layer.wiring, factors)
    after = spec.cost(spec.shape, layer.wiring, ranks)
    costs = {unit: np.array([getattr(spec.dense, unit), getattr(after, unit)], dtype=np.int64) for unit in RESOURCES}
    errors = np.array([0.0, error])
    return Curve(spec, layer.curve.tried, (None, layer.method), ((), ranks), errors, costs, errors)
