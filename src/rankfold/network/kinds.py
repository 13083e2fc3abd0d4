"""Layer kinds: how each one's weight is read, and how a wiring's stages are written as its modules.

A kind says where groups, outputs and inputs stand in the weight, and what runs a stage. Adding one is an entry in
`LAYER_KINDS`. Stages are stock `torch.nn` modules, the tensor ring's reshapes included, so what comes out is an
ordinary `nn.Sequential` that needs nothing of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfold.decompositions import Factors
from rankfold.decompositions.wiring import LayerShape, Stage, Wiring, product
from rankfold.plan import LayerSpec


@dataclass(frozen=True)
class LayerKind:
    """A type of module that can be decomposed.

    `axes` is its number of spatial axes, `transposed` whether it is a transposed convolution, and `pointwise` the type
    that mixes channels at the same resolution (the module's own type, but for transposed convolutions).
    """

    module: type[nn.Module]
    axes: int
    pointwise: type[nn.Module]
    transposed: bool = False


LAYER_KINDS: dict[type[nn.Module], LayerKind] = {
    kind.module: kind
    for kind in (
        LayerKind(nn.Linear, 0, nn.Linear),
        LayerKind(nn.Conv1d, 1, nn.Conv1d),
        LayerKind(nn.Conv2d, 2, nn.Conv2d),
        LayerKind(nn.Conv3d, 3, nn.Conv3d),
        LayerKind(nn.ConvTranspose1d, 1, nn.Conv1d, transposed=True),
        LayerKind(nn.ConvTranspose2d, 2, nn.Conv2d, transposed=True),
        LayerKind(nn.ConvTranspose3d, 3, nn.Conv3d, transposed=True),
    )
}

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Weight dtypes that are decomposed."""


def shape_of(module: nn.Module) -> LayerShape:
    """The shape of a module's weight, one group at a time; the module is of a type in `LAYER_KINDS`."""
    kind = LAYER_KINDS[type(module)]
    weight = cast(Tensor, module.weight)
    groups = int(getattr(module, "groups", 1))
    first, second = weight.shape[0] // groups, weight.shape[1]
    outputs, inputs = (second, first) if kind.transposed else (first, second)
    return LayerShape(outputs, inputs, tuple(weight.shape[2:]), groups, kind.transposed)


def weight_of(module: nn.Module) -> Float[Tensor, "g o i *taps"]:
    """A module's weight, detached, as (groups, outputs, inputs, taps), without kernel axes of size one."""
    shape = shape_of(module)
    weight = cast(Tensor, module.weight).detach()
    taps = [size for size in shape.kernel if size > 1]
    if shape.transposed:
        return weight.reshape(shape.groups, shape.inputs, shape.outputs, *taps).transpose(1, 2)
    return weight.reshape(shape.groups, shape.outputs, shape.inputs, *taps)


def module_weight(layer: LayerSpec, weight: Float[Tensor, "g o i *taps"]) -> Tensor:
    """A weight as `weight_of` gives it, in the shape the layer's module has it; differentiable."""
    return (weight.transpose(1, 2) if layer.shape.transposed else weight).reshape(layer.weight)


def stage_weights(module: nn.Module, wiring: Wiring, factors: Factors) -> list[nn.Parameter]:
    """The factors as the weights of the stages that run them, in the module's dtype and on its device."""
    original = cast(nn.Parameter, module.weight)
    return [
        nn.Parameter(weight.to(original.device, original.dtype).contiguous(), requires_grad=original.requires_grad)
        for weight in as_stage_weights(shape_of(module), wiring, factors)
    ]


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


def stage_factors(stages: nn.Module, module: nn.Module, wiring: Wiring, ranks: Sequence[int]) -> Factors:
    """The factors that the stages in place of `module` hold, in their dtype; differentiable in the stages' weights."""
    return as_factors(weights_of_stages(stages), shape_of(module), wiring, ranks)


def as_factors(weights: Sequence[Tensor], shape: LayerShape, wiring: Wiring, ranks: Sequence[int]) -> Factors:
    """The factors in tensors of the shapes of the stages' weights, or their gradients."""
    sizes = cast(dict[str, int], wiring.sizes(shape, list(ranks)))
    factors = []
    for letters, order, stage, weight in zip(
        wiring.factors, _stage_orders(shape, wiring), wiring.stages, weights, strict=True
    ):
        axes = "".join(order) + stage.taps
        split = weight.reshape(shape.groups, *(sizes[axis] for axis in axes))
        factors.append(split.permute(0, *(1 + axes.index(axis) for axis in letters)))
    return tuple(factors)


def empty_factors(shape: LayerShape, wiring: Wiring, ranks: Sequence[int]) -> Factors:
    """Uninitialised factors of a layer at the given ranks."""
    sizes = cast(dict[str, int], wiring.sizes(shape, list(ranks)))
    return tuple(torch.empty(shape.groups, *wiring.factor_shape(k, sizes)) for k in range(len(wiring.factors)))


@torch.no_grad()
def write_factors_(weights: Sequence[Tensor], shape: LayerShape, wiring: Wiring, factors: Factors) -> None:
    """Gives the stages' weights other factors of the same ranks."""
    for weight, new in zip(weights, as_stage_weights(shape, wiring, factors), strict=True):
        weight.copy_(new)


def weights_of_stages(stages: nn.Module) -> list[nn.Parameter]:
    """The weights of the stages that `factorised` made, in their order."""
    return [cast(nn.Parameter, stage.weight) for stage in stages.children() if type(stage) in LAYER_KINDS]


def _stage_orders(shape: LayerShape, wiring: Wiring) -> list[tuple[str, str]]:
    """For each stage the bonds and channel axes that make up its weight's rows, and those of its columns."""
    orders = []
    for stage, resized in zip(wiring.stages, wiring.resized(shape), strict=True):
        first, second = stage.opened, stage.summed
        if shape.transposed and resized:
            first, second = second, first
        orders.append((stage.kept + first, second))
    return orders


def factorised(
    module: nn.Module, wiring: Wiring, ranks: Sequence[int], weights: Sequence[nn.Parameter]
) -> nn.Sequential:
    """The stages of a wiring in place of `module`, around the given weights; the last stage takes the module's bias.

    Stride, padding and dilation go axis by axis to the stage that holds the axis's taps.
    """
    shape = shape_of(module)
    sizes = cast(dict[str, int], wiring.sizes(shape, list(ranks)))
    stages: list[nn.Module] = []
    carried = ""
    for stage, resized, weight in zip(wiring.stages, wiring.resized(shape), weights, strict=True):
        stages.extend(_move_bond(sizes, carried, stage, shape.groups))
        stages.append(_stage_module(module, stage, resized, weight, groups=shape.groups * product(sizes, stage.kept)))
        carried = stage.carried
    stages[-1].register_parameter("bias", cast("nn.Parameter | None", module.bias))
    return nn.Sequential(*stages).train(module.training)


def _stage_module(module: nn.Module, stage: Stage, resized: str, weight: nn.Parameter, *, groups: int) -> nn.Module:
    """One stage: a Linear, or a convolution that strides and pads along the axes in `resized`."""
    kind, shape = LAYER_KINDS[type(module)], shape_of(module)
    transposed = kind.transposed and bool(resized)
    rows, columns = weight.shape[0], weight.shape[1]
    inputs, outputs = (rows, columns * groups) if transposed else (columns * groups, rows)
    options: dict[str, Any] = {"bias": False, "device": "meta", "dtype": weight.dtype}
    if kind.axes:
        options["groups"] = groups
        options["kernel_size"] = tuple(weight.shape[2:])
        for name, neutral in (("stride", 1), ("dilation", 1), ("padding", 0), ("output_padding", 0)):
            given = getattr(module, name)
            if name == "output_padding" and not transposed:
                continue
            if isinstance(given, str):  # 'same' or 'valid' works axis by axis, and means nothing at size one
                options[name] = given if resized else neutral
            else:
                pairs = zip(shape.axes, given, strict=True)
                options[name] = tuple(value if axis in resized else neutral for axis, value in pairs)
        if resized:
            options["padding_mode"] = module.padding_mode
    made = (kind.module if transposed else kind.pointwise)(inputs, outputs, **options)
    made.weight = weight
    return made


def _move_bond(sizes: dict[str, int], before: str, stage: Stage, groups: int) -> list[nn.Module]:
    """Modules that bring a carried bond into the batch, or back out of it, ahead of a stage.

    Channels are laid out (group, bonds…), which a grouped convolution needs; where there are several groups, a channel
    shuffle turns them inside for the reshape and out again behind it.
    """
    carried = product(sizes, stage.carried or before)
    if bool(stage.carried) == bool(before) or carried == 1:
        return []
    channels = product(sizes, stage.kept + stage.summed)  # of one group, as the stage takes them
    if stage.carried:
        moves = [nn.Unflatten(1, (carried, channels * groups)), nn.Flatten(0, 1)]
    else:
        moves = [nn.Unflatten(0, (-1, carried)), nn.Flatten(1, 2)]
    return moves if groups == 1 else [nn.ChannelShuffle(groups), *moves, nn.ChannelShuffle(channels)]
