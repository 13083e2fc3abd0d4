"""Whitening: a metric that is nearly a Kronecker product, as a change of coordinates along the axes of a weight.

The second moment of patches is close to Σ ≈ Σ_i ⊗ Σ_h ⊗ Σ_w, one factor per axis that is multiplied by inputs. Then
‖(W − Ŵ) Σ^½‖ is the Frobenius norm of W − Ŵ with every such axis multiplied by its Σ^½, and since every wiring is
linear along each axis, so are its factors: what is fitted to the whitened weight in the Frobenius norm, closed forms
and alternating least squares included, is fitted to the weight in the metric once the axes are multiplied back. None of
it takes products with all of Σ.

Axes are multiplied by Σ^(p/2), p being the `POWER`. The factors that hold the outputs are solved for in the metric
itself afterwards (`projected`), and those that lead to them are then best found between the weight's own norm and the
metric (ResNet-50's `layer3.2.conv2`, `cp3` at 15 %, 26 rounds of least squares: squared errors of 0.0384, 0.0371,
0.0368, 0.0375 and 0.0383 at p = 0, ¼, ½, ¾ and 1).

Σ is taken about the mean, where that is known. Behind a ReLU the mean is most of Σ, and the same at every tap; with it
the product holds patches for smoother than they are, and its factors are as far from the best as those of the Frobenius
norm (ResNet-50's `layer2.1.conv2`, Tucker at 20 %: squared errors of 0.075, 0.023 and 0.022 before any step in the
metric itself, and 0.019 after 120 steps from the first).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rankfold.decompositions.contractions import weight_axes
from rankfold.decompositions.expansion import Expansion, Factors, Grid
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.decompositions.wiring import Wiring

POWER = 0.6
"""Of the moments that axes are multiplied by the root of."""
RIDGE = 1e-3
"""Share of the mean square that is added along every axis, for directions that hardly occur."""


@dataclass(frozen=True)
class Whitening:
    """Roots (g, n, n) of the moment to the `POWER` along the inputs and each axis of taps, and their inverses."""

    roots: tuple[Float64[Tensor, "g _ _"], ...]
    inverses: tuple[Float64[Tensor, "g _ _"], ...]

    @classmethod
    def of(cls, moment: Moment, weight: Float[Tensor, "g o i *taps"]) -> Whitening | None:
        """That of a moment about its mean on a weight; None where nothing is known of the inputs' parts."""
        moment, sides = moment.centred(), weight.shape[2:]
        if moment.joint is not None:
            count = math.prod(sides[1:])
            parts = moment.joint.reshape(len(weight), sides[0], count, sides[0], count)
            inputs, taps = torch.einsum("gitjt->gij", parts) / count, torch.einsum("gitis->gts", parts)
        elif moment.inputs is not None and moment.taps is not None:
            inputs, taps = moment.inputs, moment.taps
        else:
            return None
        pairs = [_roots(one.to(weight.device).double()) for one in (inputs, *_along_axes(taps, sides[1:]))]
        return cls(tuple(root for root, _ in pairs), tuple(inverse for _, inverse in pairs))

    def whitened(self, weight: Float[Tensor, "g o i *taps"]) -> Float64[Tensor, "g o i *taps"]:
        """The weight in these coordinates."""
        found = weight.double()
        for place, root in enumerate(self.roots, 2):
            found = _multiplied(found, root, place)
        return found

    def unwhitened(self, wiring: Wiring, factors: Factors) -> Factors:
        """Factors of the whitened weight as those of the weight."""
        return _along_letters(wiring, factors, self.inverses)

    def whitened_factors(self, wiring: Wiring, factors: Factors) -> Factors:
        """Factors of the weight as those of the whitened weight."""
        return _along_letters(wiring, factors, self.roots)

    def left_of(self, moment: Moment, sizes: Sequence[int]) -> Moment:
        """The metric in these coordinates, of weights with inputs and taps of such `sizes`."""
        if moment.joint is None:
            return IDENTITY
        square = moment.joint
        for _ in range(2):
            square = square.reshape(*square.shape[:2], *sizes)
            for place, inverse in enumerate(self.inverses, 2):
                square = _multiplied(square, inverse, place)
            square = square.flatten(2).mT
        return Moment(joint=square, positions=moment.positions)


class WhitenedExpansion(Expansion):
    """An expansion of a whitened weight, with factors of the weight as it is; errors are those of the whitened one."""

    def __init__(self, weight: Float64[Tensor, "g o i *taps"], inner: Expansion, whitening: Whitening) -> None:
        self.wiring, self.weight, self.inner, self.whitening = inner.wiring, weight, inner, whitening

    def grids(self) -> tuple[Grid, ...]:
        return self.inner.grids()

    def max_ranks(self) -> tuple[int, ...]:
        return self.inner.max_ranks()

    def factors(self, ranks: Sequence[int]) -> Factors:
        return self.whitening.unwhitened(self.wiring, self.inner.factors(ranks))


def _along_letters(wiring: Wiring, factors: Factors, matrices: Sequence[Tensor]) -> Factors:
    """Factors with every axis that is an input's or a tap's multiplied by its matrix."""
    by_letter = dict(zip(weight_axes(wiring)[1:], matrices, strict=True))
    found = []
    for letters, factor in zip(wiring.factors, factors, strict=True):
        for place, letter in enumerate(letters, 1):
            if letter in by_letter:
                factor = _multiplied(factor, by_letter[letter], place)
        found.append(factor)
    return tuple(found)


def _along_axes(taps: Float64[Tensor, "g t t"], sizes: Sequence[int]) -> list[Tensor]:
    """The moment along every axis of taps: the mean over the others, of mean square one."""
    found = []
    for axis, size in enumerate(sizes):
        before, behind = math.prod(sizes[:axis]), math.prod(sizes[axis + 1 :])
        parts = taps.reshape(len(taps), before, size, behind, before, size, behind)
        own = torch.einsum("gabcadc->gbd", parts)
        found.append(own / own.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)[:, None, None])
    return found


def _roots(square: Float64[Tensor, "g n n"]) -> tuple[Tensor, Tensor]:
    """The symmetric root of a moment to the `POWER`, and its inverse; the identity where it is zero."""
    values, vectors = torch.linalg.eigh(square)
    mean = values.mean(-1, keepdim=True)
    values = torch.where(mean > 0, values.clamp_min(0) + RIDGE * mean, 1.0) ** (POWER / 2)
    return (vectors * values[:, None]) @ vectors.mT, (vectors / values[:, None]) @ vectors.mT


def _multiplied(tensor: Tensor, matrix: Float64[Tensor, "g n n"], place: int) -> Tensor:
    """A tensor (g, …) with one of its axes multiplied by a symmetric matrix of every group."""
    moved = tensor.movedim(place, -1)
    return (moved.flatten(1, -2) @ matrix.to(moved)).reshape(moved.shape).movedim(-1, place)
