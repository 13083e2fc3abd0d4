"""Narrowing: layers with fewer channels in the place of others, in a network that is changed in place.

The layers that make the channels keep the rows of those that stay; what works channel by channel keeps its entries; the
layers that read them keep the columns, or get weights in which the other channels are rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.decompositions import reconstruct
from rankfold.decompositions.interpolative import by_group, entries, interpolated, padded
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.errors import PlanError, reason_of
from rankfold.network.copies import sharing
from rankfold.network.factorised import Factorised
from rankfold.network.kinds import known_kind, shape_of, weight_of
from rankfold.network.layouts import laid_out
from rankfold.network.passes import Inputs, run, same, tensors_in
from rankfold.plan import ChannelSet, LayerPlan, Narrowing, Plan

_SIZES = {"outputs": ("out_features", "out_channels", "nf"), "inputs": ("in_features", "in_channels", "nx")}


def narrow_(model: nn.Module, narrowings: Iterable[Narrowing]) -> nn.Module:
    """The model with the kept channels alone, in place; layers that read them keep their columns.

    Raises PlanError where a narrowing names channels or layers that are not there.
    """
    for narrowing in narrowings:
        channels, kept = narrowing.channels, torch.tensor(narrowing.kept)
        _check(model, narrowing)
        rows: dict[str, list[Tensor]] = {}
        for port in channels.producers:
            rows.setdefault(port.layer, []).append(port.start + kept)
        for name, parts in rows.items():
            _keep_outputs_(model.get_submodule(name), torch.cat(parts))
        for name in channels.between:
            _keep_between_(model, name, kept)
        for port in channels.consumers:
            _keep_inputs_(model.get_submodule(port.layer), entries(narrowing.kept, port.inner))
    return model


def rows_of(narrowings: Iterable[Narrowing], layer: str, total: int) -> Tensor:
    """Which of a layer's outputs are kept, in rising order."""
    gone = torch.zeros(total, dtype=torch.bool)
    for narrowing in narrowings:
        dropped = _dropped(narrowing)
        for port in narrowing.channels.producers:
            if port.layer == layer:
                gone[port.start : port.start + len(dropped)] |= dropped
        if layer in narrowing.channels.between:
            gone |= dropped
    return torch.nonzero(~gone)[:, 0]


def columns_of(narrowings: Iterable[Narrowing], layer: str, total: int) -> Tensor:
    """Which of a layer's inputs, of all groups together, are kept, in rising order."""
    gone = torch.zeros(total, dtype=torch.bool)
    for narrowing in narrowings:
        dropped = _dropped(narrowing)
        for port in narrowing.channels.consumers:
            if port.layer == layer:
                gone |= dropped.repeat_interleave(port.inner)
        if layer in narrowing.channels.between and len(dropped) == total:
            gone |= dropped
    return torch.nonzero(~gone)[:, 0]


def _dropped(narrowing: Narrowing) -> Tensor:
    """Which channels of a set are gone."""
    dropped = torch.ones(narrowing.channels.size, dtype=torch.bool)
    dropped[list(narrowing.kept)] = False
    return dropped


def rebuild_(student: nn.Module, model: nn.Module, plan: Plan, moments: Mapping[str, Moment]) -> None:
    """Gives every layer that reads narrowed channels the weight that rebuilds those that are gone.

    What the mean of its outputs loses goes to its bias, where the moment says the mean of its inputs.
    """
    for layer in plan.changed:
        if not any(port.layer == layer.name for one in plan.narrowings for port in one.channels.consumers):
            continue
        weight, moment = weight_of(model.get_submodule(layer.name)), moments.get(layer.name, IDENTITY)
        rows, columns = kept_of(plan, layer.name, weight)
        rebuilt = interpolated(weight, moment, columns)
        own = student.get_submodule(layer.name)
        split = by_group(rows, len(weight), weight.shape[1])
        write_weight_(own, torch.stack([rebuilt[group][one] for group, one in enumerate(split)]))
        bias = cast("nn.Parameter | None", own.bias)
        if bias is not None and moment.mean is not None:
            lost = weight.double() - padded(rebuilt, weight.shape[2], columns)
            shift = (lost.flatten(2) @ moment.mean.to(lost)[..., None]).flatten()[rows]
            bias.data += shift.to(bias)


def narrowed_moment(moment: Moment, model: nn.Module, plan: Plan, layer: LayerPlan) -> Moment:
    """The moment of what goes into a layer of the original, for the inputs and outputs alone that are kept."""
    if moment is IDENTITY or not layer.narrowed:
        return moment
    weight = weight_of(model.get_submodule(layer.name))
    groups, outputs, inputs = weight.shape[:3]
    rows, columns = kept_of(plan, layer.name, weight)
    if shape_of(model.get_submodule(layer.name)).depthwise:
        return moment.of_groups(columns)
    moment = moment.of_outputs(by_group(rows, groups, outputs))
    return moment.of_inputs(by_group(columns, groups, inputs), weight[0, 0, 0].numel())


def narrowed_error(model: nn.Module, student: nn.Module, plan: Plan, layer: LayerPlan, moment: Moment) -> float:
    """The squared relative error of the outputs that a narrowed layer keeps, factors or not."""
    weight, own = weight_of(model.get_submodule(layer.name)).double(), cast(Any, student.get_submodule(layer.name))
    rows, columns = kept_of(plan, layer.name, weight)
    composed = composed_weight(own).double()
    if shape_of(model.get_submodule(layer.name)).depthwise:
        kept, moment = weight[columns], moment if moment is IDENTITY else moment.of_groups(columns)
    else:
        split = by_group(rows, len(weight), weight.shape[1])
        kept = torch.stack([weight[group][one] for group, one in enumerate(split)])
        composed, moment = padded(composed, weight.shape[2], columns), moment.of_outputs(split)
    energy = float(moment.energy(kept))
    return float(moment.energy(kept - composed)) / energy if energy > 0 else 0.0


def kept_of(plan: Plan, layer: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs and inputs, of all groups together, that a layer with a weight (g, o, i, *taps) keeps in a plan."""
    groups, outputs, inputs = weight.shape[:3]
    return rows_of(plan.narrowings, layer, groups * outputs), columns_of(plan.narrowings, layer, groups * inputs)


def composed_weight(module: nn.Module) -> Tensor:
    """The weight (g, o, i, *taps) of a layer, or that which its factors stand for."""
    if isinstance(module, Factorised):
        return reconstruct(module.role.wiring, tuple(one.detach() for one in module.factors))
    return weight_of(module)


def permuted(channels: ChannelSet, generator: torch.Generator) -> Narrowing:
    """All channels in another order, part by part: what computes the same, where the channels are what they seem."""
    run = channels.size // channels.parts
    order = torch.cat([part * run + torch.randperm(run, generator=generator) for part in range(channels.parts)])
    return Narrowing(channels, tuple(order.tolist()), channels.through, channels.through)


def tried(
    model: nn.Module, inputs: Inputs, sets: Sequence[ChannelSet]
) -> tuple[tuple[ChannelSet, ...], dict[str, str]]:
    """The sets whose channels can stand in any order without a change of what the network gives; why others cannot."""
    outputs = tensors_in(run(model, inputs))
    return _tried(model, inputs, sets, outputs)


def _tried(
    model: nn.Module, inputs: Inputs, sets: Sequence[ChannelSet], outputs: list[Tensor]
) -> tuple[tuple[ChannelSet, ...], dict[str, str]]:
    if not sets:
        return (), {}
    generator = torch.Generator().manual_seed(len(sets))
    try:
        shuffled = narrow_(sharing(model), [permuted(one, generator) for one in sets])
        reason = "" if same(tensors_in(run(shuffled, inputs)), outputs) else "the order of its channels matters"
    except Exception as error:
        reason = f"the network does not run with its channels in another order: {reason_of(error)}"
    if not reason:
        return tuple(sets), {}
    if len(sets) == 1:
        return (), {sets[0].name: reason}
    half = len(sets) // 2
    first, second = (_tried(model, inputs, part, outputs) for part in (sets[:half], sets[half:]))
    return (*first[0], *second[0]), {**first[1], **second[1]}


def write_weight_(module: nn.Module, weight: Tensor) -> None:
    """Gives a layer other numbers, (g, o, i, *taps) as `weight_of` reads them."""
    own = cast(Tensor, module.weight)
    turned = weight.transpose(1, 2) if known_kind(module).transposed else weight
    own.data.copy_(turned.reshape(own.shape))


def _keep_outputs_(module: nn.Module, rows: Tensor) -> None:
    """A layer with some of its outputs, of all groups together; as many of each group."""
    shape = shape_of(module)
    split = by_group(rows, shape.groups, shape.outputs)
    weight = weight_of(module)
    chosen = torch.stack([weight[group].index_select(0, one.to(weight.device)) for group, one in enumerate(split)])
    bias = cast("Tensor | None", module.bias)
    _resize_(module, chosen, None if bias is None else bias.detach().index_select(0, rows.to(bias.device)), "outputs")


def _keep_inputs_(module: nn.Module, columns: Tensor) -> None:
    """A layer with some of its inputs, of all groups together; as many of each group."""
    shape = shape_of(module)
    split = by_group(columns, shape.groups, shape.inputs)
    weight = weight_of(module)
    chosen = torch.stack([weight[group].index_select(1, one.to(weight.device)) for group, one in enumerate(split)])
    bias = cast("Tensor | None", module.bias)
    _resize_(module, chosen, None if bias is None else bias.detach(), "inputs")


def _keep_between_(model: nn.Module, name: str, kept: Tensor) -> None:
    """What works channel by channel, on some channels."""
    if _is_parameter(model, name):
        holder, _, own = name.rpartition(".")
        parameter = model.get_parameter(name)
        axis = next(k for k, size in enumerate(parameter.shape) if size == parameter.numel())
        part = parameter.detach().index_select(axis, kept.to(parameter.device))
        setattr(model.get_submodule(holder), own, nn.Parameter(part, parameter.requires_grad))
        return
    module: Any = model.get_submodule(name)
    size = next(one.shape[0] for one in (*module.parameters(), *module.buffers()) if one.ndim)
    for own, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and tensor.ndim and tensor.shape[0] == size:
            part = tensor.detach().index_select(0, kept.to(tensor.device)).clone()
            keeps = isinstance(tensor, nn.Parameter)
            setattr(module, own, nn.Parameter(part, tensor.requires_grad) if keeps else part)
    for attribute in ("num_features", "num_parameters", "in_channels", "out_channels", "groups"):
        if hasattr(module, attribute):
            setattr(module, attribute, len(kept))


def _resize_(module: nn.Module, weight: Tensor, bias: Tensor | None, side: str) -> None:
    """Gives a layer a weight (g, o, i, *taps) of another size, and tells it."""
    kind, own = known_kind(module), cast(nn.Parameter, module.weight)
    turned = weight.transpose(1, 2) if kind.transposed else weight
    kernel = own.shape[2:] if kind.axes else ()
    flat = turned.reshape(*((turned.shape[0] * turned.shape[1], turned.shape[2])), *kernel)
    module.weight = nn.Parameter(laid_out(flat, own), own.requires_grad)
    if bias is not None:
        module.bias = nn.Parameter(bias.clone(), cast(nn.Parameter, module.bias).requires_grad)
    size = weight.shape[0] * weight.shape[1 if side == "outputs" else 2]
    for name in _SIZES[side]:
        if hasattr(module, name):
            setattr(module, name, size)


def _check(model: nn.Module, narrowing: Narrowing) -> None:
    """Raises PlanError where a narrowing does not fit a model, or keeps what is not there."""
    channels, kept = narrowing.channels, narrowing.kept
    if not kept:
        raise PlanError(f"{channels.name}: no channel is kept of {channels.size}; keep at least one of every part")
    wrong = [one for one in kept if not 0 <= one < channels.size]
    if wrong or len(set(kept)) < len(kept):
        what = f"channel {wrong[0]} of {channels.size}" if wrong else "a channel twice"
        raise PlanError(f"{channels.name}: the plan keeps {what}; the channels are 0 to {channels.size - 1}")
    run = channels.size // channels.parts
    counts = {sum(one // run == part for one in kept) for part in range(channels.parts)}
    if len(counts) > 1:
        raise PlanError(f"{channels.name}: the plan keeps unequally many channels of the {channels.parts} groups")
    for name in (*channels.layers, *channels.between):
        try:
            model.get_parameter(name) if _is_parameter(model, name) else model.get_submodule(name)
        except AttributeError:
            raise PlanError(f"the plan does not fit the model: it has no {name!r}") from None
    for ports, side in ((channels.producers, "outputs"), (channels.consumers, "inputs")):
        for port in ports:
            shape = shape_of(model.get_submodule(port.layer))
            there = shape.groups * (shape.outputs if side == "outputs" else shape.inputs)
            needed = port.start + channels.size if side == "outputs" else channels.size * port.inner
            if there < needed or (side == "inputs" and there != needed):
                raise PlanError(
                    f"{port.layer}: the plan's {channels.size} channels do not fit its {there} {side}; "
                    "give the model that the plan was made for"
                )


def _is_parameter(model: nn.Module, name: str) -> bool:
    holder, _, own = name.rpartition(".")
    try:
        return own in model.get_submodule(holder)._parameters
    except AttributeError:
        return False
