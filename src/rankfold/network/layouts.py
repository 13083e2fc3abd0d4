"""Layouts: factors in the shapes of the weights of the stages that run them, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from rankfold.decompositions import Factors
from rankfold.decompositions.wiring import LayerShape, Wiring, product


def as_stage_weights(shape: LayerShape, wiring: Wiring, factors: Factors) -> list[Tensor]:
    """The factors, or their gradients, in the shapes of the stages' weights."""
    weights = []
    for letters, order, stage, factor in zip(
        wiring.factors, _stage_orders(shape, wiring), wiring.stages, factors, strict=True
    ):
        moved = factor.permute(0, *(1 + letters.index(axis) for axis in "".join(order) + stage.taps))
        sizes = dict(zip(letters, factor.shape[1:], strict=True))
        kernel = [sizes[axis] if axis in stage.taps else 1 for axis in shape.axes]
        rows, columns = (product(sizes, axes) for axes in order)
        weights.append(moved.reshape(shape.groups * rows, columns, *kernel))
    return weights


def as_factors(weights: Sequence[Tensor], shape: LayerShape, wiring: Wiring, ranks: Sequence[int]) -> Factors:
    """The factors in tensors of the shapes of the stages' weights, or their gradients; differentiable."""
    sizes = cast(dict[str, int], wiring.sizes(shape, list(ranks)))
    factors = []
    for letters, order, stage, weight in zip(
        wiring.factors, _stage_orders(shape, wiring), wiring.stages, weights, strict=True
    ):
        axes = "".join(order) + stage.taps
        split = weight.reshape(shape.groups, *(sizes[axis] for axis in axes))
        factors.append(split.permute(0, *(1 + axes.index(axis) for axis in letters)))
    return tuple(factors)


def laid_out(weight: Tensor, like: Tensor) -> Tensor:
    """A weight in the order in memory that another one has: channels last, or as usual.

    Convolutions of images whose channels are last turn weights that are not so in every call.
    """
    for axes, form in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if weight.ndim == like.ndim == axes and like.is_contiguous(memory_format=form) and not like.is_contiguous():
            return weight.contiguous(memory_format=form)
    return weight.contiguous()


def empty_factors(shape: LayerShape, wiring: Wiring, ranks: Sequence[int]) -> Factors:
    """Uninitialised factors of a layer at the given ranks."""
    sizes = cast(dict[str, int], wiring.sizes(shape, list(ranks)))
    return tuple(torch.empty(shape.groups, *wiring.factor_shape(k, sizes)) for k in range(len(wiring.factors)))


@torch.no_grad()
def write_factors_(weights: Sequence[Tensor], shape: LayerShape, wiring: Wiring, factors: Factors) -> None:
    """Gives the stages' weights other factors of the same ranks."""
    for weight, new in zip(weights, as_stage_weights(shape, wiring, factors), strict=True):
        weight.copy_(new)


def _stage_orders(shape: LayerShape, wiring: Wiring) -> list[tuple[str, str]]:
    """For each stage the bonds and channel axes that make up its weight's rows, and those of its columns."""
    orders = []
    for stage, resized in zip(wiring.stages, wiring.resized(shape), strict=True):
        first, second = stage.opened, stage.summed
        if shape.transposed and resized:
            first, second = second, first
        orders.append((stage.kept + first, second))
    return orders
