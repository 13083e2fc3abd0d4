"""Layer kinds: how each one's weight is read, and how a wiring's stages are written as its modules.

A kind says where groups, outputs and inputs stand in the weight, and what runs a stage. Adding one is an entry in
`LAYER_KINDS`. Stages are stock `torch.nn` modules, the tensor ring's reshapes included; what holds them is an
`nn.Sequential` that answers as the layer did (`network/factorised.py`).
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
from rankfold.network.factorised import Factorised, Role, TransposedLinear, stand_in
from rankfold.network.layouts import as_factors, as_stage_weights, laid_out
from rankfold.network.stand_ins.stack import FactorBlocks, Stack
from rankfold.plan import LayerSpec


@dataclass(frozen=True)
class LayerKind:
    """A type of module that can be decomposed, by its class or, where that is of an optional package, the class's name.

    `axes` is its number of spatial axes; `transposed` says that inputs stand before outputs in the weight (a transposed
    convolution, or a Linear that keeps its weight so); `lookup` that rows of the weight, its outputs, are read and not
    multiplied; `stacked` that it is one matrix of several for each input. `pointwise` is the type that mixes channels
    at the same resolution.
    """

    module: type[nn.Module] | str
    axes: int
    pointwise: type[nn.Module]
    transposed: bool = False
    lookup: bool = False
    stacked: bool = False

    @property
    def name(self) -> str:
        """The class's name, by which plans call the kind."""
        return self.module.rpartition(".")[2] if isinstance(self.module, str) else self.module.__name__


LAYER_KINDS: dict[type[nn.Module] | str, LayerKind] = {
    kind.module: kind
    for kind in (
        LayerKind(nn.Linear, 0, nn.Linear),
        LayerKind("transformers.pytorch_utils.Conv1D", 0, nn.Linear, transposed=True),
        LayerKind(nn.Embedding, 0, nn.Linear, lookup=True),
        LayerKind(Stack, 0, nn.Linear, stacked=True),
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


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a layer; None for a module of none, or one that computes something else than what it is derived of.

    A subclass whose way forward is its base's is that base.
    """
    for base in type(module).__mro__:
        kind = LAYER_KINDS.get(base) or LAYER_KINDS.get(f"{base.__module__}.{base.__qualname__}")
        if kind is not None:
            return kind if _runs_as(module, base) else None
    return None


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The class in `LAYER_KINDS` that a module's is derived of, whatever it computes; None where there is none."""
    known = (base for base in type(module).__mro__ if base in LAYER_KINDS)
    return next(known, None)


def known_kind(module: nn.Module) -> LayerKind:
    """The kind of a module that has one."""
    return cast(LayerKind, kind_of(module))


def _runs_as(module: nn.Module, base: type) -> bool:
    """Whether calling a module runs the base class's own code, and no other."""
    own = type(module)
    ways = ("forward", "_conv_forward", "__call__", "_call_impl")
    patched = any(way in vars(module) for way in ways)
    return not patched and all(getattr(own, way, None) is getattr(base, way, None) for way in ways)


def shape_of(module: nn.Module) -> LayerShape:
    """The shape of a module's weight, one group at a time; the module is of a kind in `LAYER_KINDS`."""
    kind, weight = known_kind(module), cast(Tensor, module.weight)
    if kind.stacked:
        groups, *sizes = weight.shape
        outputs, inputs = sizes if cast(Stack, module).by_rows else sizes[::-1]
        return LayerShape(outputs, inputs, (), groups, routed=True)
    groups = int(getattr(module, "groups", 1))
    first, second = weight.shape[0] // groups, weight.shape[1]
    outputs, inputs = (second, first) if kind.transposed else (first, second)
    return LayerShape(outputs, inputs, tuple(weight.shape[2:]), groups, kind.transposed)


def weight_of(module: nn.Module) -> Float[Tensor, "g o i *taps"]:
    """A module's weight, detached, as (groups, outputs, inputs, taps), without kernel axes of size one."""
    shape = shape_of(module)
    weight = cast(Tensor, module.weight).detach()
    if isinstance(module, Stack):
        return weight if module.by_rows else weight.mT
    taps = [size for size in shape.kernel if size > 1]
    if shape.transposed:
        return weight.reshape(shape.groups, shape.inputs, shape.outputs, *taps).transpose(1, 2)
    return weight.reshape(shape.groups, shape.outputs, shape.inputs, *taps)


def weight_shape(shape: LayerShape) -> tuple[int, ...]:
    """The shape in which modules that are not stacked keep a weight."""
    rows, columns = (shape.inputs, shape.outputs) if shape.transposed else (shape.outputs, shape.inputs)
    return (shape.groups * rows, columns, *shape.kernel)


def module_weight(layer: LayerSpec, weight: Float[Tensor, "g o i *taps"]) -> Tensor:
    """A weight as `weight_of` gives it, in the shape the layer's module has it; differentiable."""
    turned = layer.shape.transposed or (layer.shape.routed and weight.shape != layer.weight)  # square: either serves
    return (weight.transpose(1, 2) if turned else weight).reshape(layer.weight)


def stage_weights(module: nn.Module, wiring: Wiring, factors: Factors) -> list[nn.Parameter]:
    """The factors as the weights of the stages that run them, in the module's dtype and on its device."""
    original = cast(nn.Parameter, module.weight)
    return [
        nn.Parameter(
            laid_out(weight.to(original.device, original.dtype), original), requires_grad=original.requires_grad
        )
        for weight in as_stage_weights(shape_of(module), wiring, factors)
    ]


def stage_factors(stages: nn.Module, module: nn.Module, wiring: Wiring, ranks: Sequence[int]) -> Factors:
    """The factors that the stages in place of `module` hold, in their dtype; differentiable in the stages' weights."""
    return as_factors(weights_of_stages(stages), shape_of(module), wiring, ranks)


def weights_of_stages(stages: nn.Module) -> list[nn.Parameter]:
    """The weights of the stages that `factorised` made, in the order of the wiring."""
    return cast(Factorised, stages).weights


def factorised(module: nn.Module, wiring: Wiring, ranks: Sequence[int], weights: Sequence[nn.Parameter]) -> Factorised:
    """The stages of a wiring in place of `module`, around the given weights; the last stage takes the module's bias.

    Stride, padding and dilation go axis by axis to the stage that holds the axis's taps.
    """
    kind, shape = known_kind(module), shape_of(module)
    places: tuple[int, ...]
    if kind.lookup:
        stages, places = _lookup_stages(cast(nn.Embedding, module), weights), (1, 0)
    elif kind.stacked:
        stages, places = [FactorBlocks(weight, shape.groups) for weight in weights], tuple(range(len(weights)))
    else:
        stages = _module_stages(module, wiring, ranks, weights)
        places = tuple(place for place, stage in enumerate(stages) if hasattr(stage, "weight"))
        stages[-1].register_parameter("bias", cast("nn.Parameter | None", module.bias))
    turned = kind.transposed or (isinstance(module, Stack) and not module.by_rows)
    weight = tuple(cast(Tensor, module.weight).shape)
    return stand_in(module, stages, Role(shape, wiring, tuple(ranks), weight, turned, places))


def _module_stages(
    module: nn.Module, wiring: Wiring, ranks: Sequence[int], weights: Sequence[nn.Parameter]
) -> list[nn.Module]:
    """The stages of a layer that multiplies, in the order they run."""
    shape = shape_of(module)
    sizes = cast(dict[str, int], wiring.sizes(shape, list(ranks)))
    stages: list[nn.Module] = []
    carried = ""
    for stage, resized, weight in zip(wiring.stages, wiring.resized(shape), weights, strict=True):
        stages.extend(_move_bond(sizes, carried, stage, shape.groups))
        stages.append(_stage_module(module, stage, resized, weight, groups=shape.groups * product(sizes, stage.kept)))
        carried = stage.carried
    return stages


def _lookup_stages(module: nn.Embedding, weights: Sequence[nn.Parameter]) -> list[nn.Module]:
    """A narrow embedding, and what widens it: the last factor of the matrix, then the first."""
    first, last = weights
    narrow = nn.Embedding(
        last.shape[0],
        last.shape[1],
        padding_idx=module.padding_idx,
        scale_grad_by_freq=module.scale_grad_by_freq,
        sparse=module.sparse,
        _weight=last,
    )
    narrow.weight = last
    return [narrow, TransposedLinear(first)]


def stage_options(module: nn.Module, resized: str) -> dict[str, Any]:
    """How a stage of a convolution moves: as the layer does along the axes in `resized`, by one along the others."""
    kind, axes, options = known_kind(module), shape_of(module).axes, dict[str, Any]()
    for name, neutral in (("stride", 1), ("dilation", 1), ("padding", 0), ("output_padding", 0)):
        given = getattr(module, name)
        if name == "output_padding" and not (kind.transposed and resized):
            continue
        if isinstance(given, str):  # 'same' or 'valid' works axis by axis, and means nothing at size one
            options[name] = given if resized else (neutral,) * kind.axes
        else:
            pairs = zip(axes, given, strict=True)
            options[name] = tuple(value if axis in resized else neutral for axis, value in pairs)
    return options


def _stage_module(module: nn.Module, stage: Stage, resized: str, weight: nn.Parameter, *, groups: int) -> nn.Module:
    """One stage: a Linear, or a convolution that strides and pads along the axes in `resized`."""
    kind = known_kind(module)
    transposed = kind.transposed and bool(resized)
    rows, columns = weight.shape[0], weight.shape[1]
    inputs, outputs = (rows, columns * groups) if transposed else (columns * groups, rows)
    options: dict[str, Any] = {"bias": False, "device": "meta", "dtype": weight.dtype}
    if kind.axes:
        options |= {"groups": groups, "kernel_size": tuple(weight.shape[2:]), **stage_options(module, resized)}
        if resized:
            options["padding_mode"] = module.padding_mode
    made = (cast(Any, kind.module) if transposed else kind.pointwise)(inputs, outputs, **options)
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
        moves: list[nn.Module] = [nn.Unflatten(1, (carried, channels * groups)), nn.Flatten(0, 1)]
    else:
        moves = [nn.Unflatten(0, (-1, carried)), nn.Flatten(1, 2)]
    return moves if groups == 1 else [nn.ChannelShuffle(groups), *moves, nn.ChannelShuffle(channels)]
