"""Rehearsal: a plan tried on the network before anything is fitted.

The network is run with factors of the planned ranks, filled with random numbers. Layers that break it, or with which it
costs something else than the plan says, are found by halving, and named with what happened. MACs that depend on the
data (routing, detection) are told from a fault by the same network with the weights that the factors stand for: it
takes the same paths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from rankfold.budget import Cost
from rankfold.decompositions import Factors, wiring_of
from rankfold.decompositions.wiring import Call
from rankfold.errors import ModelError
from rankfold.network.copies import duplicate
from rankfold.network.costs import cost_of
from rankfold.network.factorised import Factorised
from rankfold.network.kinds import shape_of
from rankfold.network.layouts import empty_factors
from rankfold.network.opening import open_, within
from rankfold.network.passes import Inputs, reason_of
from rankfold.network.surgery import opened_for, swapped
from rankfold.network.tracing import uses
from rankfold.plan import LayerPlan, Plan


@dataclass(frozen=True)
class Rehearsal:
    """What came of a plan: the cost of the network it makes, and why some layers have to stay as they are.

    `depends` says that the MACs depend on the data.
    """

    cost: Cost
    refused: dict[str, str]
    depends: bool = False


def rehearse(model: nn.Module, plan: Plan, inputs: Inputs) -> Rehearsal:
    """The plan tried on the network, which is left as it is."""
    outcome = _tried(model, plan, inputs)
    if isinstance(outcome, Rehearsal):
        return outcome
    return Rehearsal(plan.after, _culprits(model, plan, inputs, plan.decomposed, outcome))


def verified(model: nn.Module, student: nn.Module, plan: Plan, inputs: Inputs) -> Plan:
    """The plan with the student's measured cost; raises ModelError where that is neither the plan's nor explained.

    Only where MACs depend on the data can it be another than the plan's, which then says so in its settings.
    """
    cost = cost_of(student, inputs)
    if cost == plan.after and not plan.settings.get("macs_depend_on_data"):
        return plan
    if cost.macs != plan.after.macs and cost.macs != expected_macs(model, student, plan, inputs):
        raise ModelError(
            f"the compressed model has {cost.macs:,} MACs where its plan has {plan.after.macs:,}, and the original has "
            "others with the same weights; does its forward depend on anything but its inputs?"
        )
    return replace(plan, after=cost, settings={**plan.settings, "macs_depend_on_data": True})


def dense_twin(model: nn.Module, student: nn.Module, plan: Plan) -> nn.Module:
    """The original with the weights that a student's factors stand for, and the student's biases."""
    twin = open_(duplicate(model), plan.opened)
    for layer in plan.decomposed:
        for path in (layer.name, *layer.aliases):
            module, stages = twin.get_submodule(path), cast(Factorised, student.get_submodule(path))
            module.register_parameter("weight", nn.Parameter(stages.weight.detach()))
            if getattr(module, "bias", None) is not None:
                module.register_parameter("bias", cast(nn.Parameter, stages.bias))
    return twin


def expected_macs(model: nn.Module, student: nn.Module, plan: Plan, inputs: Inputs) -> int:
    """The MACs that a student should have on the paths that it takes through the network."""
    twin = dense_twin(model, student, plan)
    places = {layer: [twin.get_submodule(path) for path in (layer.name, *layer.aliases)] for layer in plan.decomposed}
    modules = [module for group in places.values() for module in dict.fromkeys(group)]
    macs = cost_of(twin, inputs).macs
    calls = uses(twin, inputs, modules).calls
    for layer, group in places.items():
        served: tuple[Call, ...] = tuple(call for module in dict.fromkeys(group) for call in calls[module])
        shape = replace(shape_of(group[0]), calls=served)
        wiring = wiring_of(cast(str, layer.decomposition), shape)
        macs += int(wiring.macs(shape, list(layer.ranks))) - shape.macs
    return macs


def _tried(model: nn.Module, plan: Plan, inputs: Inputs) -> Rehearsal | str:
    """The cost of the network that a plan makes, or what is wrong with it."""
    dense = opened_for(model, plan)
    start = cost_of(dense, inputs) if plan.opened else plan.before
    expected = reduce(Cost.__add__, (layer.after - layer.before for layer in plan.decomposed), start)
    student = open_(duplicate(model), plan.opened)
    for number, layer in enumerate(plan.decomposed):
        student = swapped(student, layer, _random_factors(student, layer, number))
    try:
        cost = cost_of(student, inputs)
        if cost == expected:
            return Rehearsal(cost, {})
        if (cost.params, cost.bytes) == (expected.params, expected.bytes):
            if cost.macs == expected_macs(model, student, plan, inputs):
                return Rehearsal(cost, {}, depends=True)
            return f"with factors in its place the network has {cost.macs:,} MACs, not {expected.macs:,}"
    except ModelError as error:
        return f"the network does not run with factors in its place ({reason_of(error.__cause__ or error)})"
    return f"with factors in its place the network has {cost.params:,} parameters, not {expected.params:,}"


def _culprits(
    model: nn.Module, plan: Plan, inputs: Inputs, layers: Sequence[LayerPlan], outcome: str
) -> dict[str, str]:
    """The layers because of which a plan fails, among some that fail together."""
    if len(layers) == 1:
        return {layers[0].name: outcome}
    refused: dict[str, str] = {}
    for half in (layers[: len(layers) // 2], layers[len(layers) // 2 :]):
        part = plan.with_layers(tuple(half))
        part = replace(part, opened=within(plan.opened, [layer.name for layer in half]))
        told = _tried(model, part, inputs)
        if isinstance(told, str):
            refused.update(_culprits(model, plan, inputs, half, told))
    # neither half fails alone: they do together, and all of them have to stay
    return refused or dict.fromkeys((layer.name for layer in layers), outcome)


def _random_factors(model: nn.Module, layer: LayerPlan, seed: int) -> Factors:
    """Random factors at a layer's ranks, about as large in their product as weights are."""
    shape = shape_of(model.get_submodule(layer.name))
    wiring = wiring_of(cast(str, layer.decomposition), shape)
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for letters, factor in zip(wiring.factors, empty_factors(shape, wiring, layer.ranks), strict=True):
        columns = factor[0].numel() // (factor.shape[1 + letters.index("o")] if "o" in letters else 1)
        made.append(torch.randn(factor.shape, generator=generator) / math.sqrt(max(columns, 1)))
    return tuple(made)
