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
from rankfold.decompositions.wiring import Call, LayerShape, Wiring
from rankfold.errors import ModelError, PlanError, reason_of
from rankfold.network.copies import duplicate
from rankfold.network.costs import cost_of
from rankfold.network.factorised import Factorised
from rankfold.network.kinds import shape_of
from rankfold.network.layouts import empty_factors
from rankfold.network.narrowing import narrow_
from rankfold.network.opening import open_, within
from rankfold.network.passes import Inputs
from rankfold.network.surgery import opened_for, swapped
from rankfold.network.tracing import uses
from rankfold.plan import LayerPlan, Narrowing, Plan, channels_named


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
    outcome = _tried(model, plan, inputs, whole=True)
    if isinstance(outcome, Rehearsal):
        return outcome
    return Rehearsal(plan.after, _culprits(model, plan, inputs, (*plan.narrowings, *plan.decomposed), outcome))


def rehearsed(model: nn.Module, plan: Plan) -> nn.Module:
    """The network that a plan makes, with random factors: it costs what the student will, and takes as long."""
    student = narrow_(open_(duplicate(model), plan.opened), plan.narrowings)
    for number, layer in enumerate(plan.decomposed):
        student = swapped(student, layer, _random_factors(student, layer, number))
    return student


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
    twin = narrow_(open_(duplicate(model), plan.opened), plan.narrowings)
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
    served = _served(twin, plan, inputs)
    saved = (int(_wiring(one, shape).macs(shape, list(one.ranks))) - shape.macs for one, shape in served.items())
    return cost_of(twin, inputs).macs + sum(saved)


def _tried(model: nn.Module, plan: Plan, inputs: Inputs, *, whole: bool = False) -> Rehearsal | str:
    """The cost of the network that a plan makes, or what is wrong with it.

    Of the `whole` plan the cost has to be the one it says.
    """
    try:
        expected = _expected(model, plan, inputs)
        if whole and plan.narrowings and not _as_planned(model, plan, inputs, expected):
            return f"without its channels the network has {expected.params:,} parameters and {expected.macs:,} MACs"
        student = rehearsed(model, plan)
        cost = cost_of(student, inputs)
        if cost == expected:
            return Rehearsal(cost, {})
        if (cost.params, cost.bytes) == (expected.params, expected.bytes):
            if cost.macs == expected_macs(model, student, plan, inputs):
                return Rehearsal(cost, {}, depends=True)
            return f"with factors in its place the network has {cost.macs:,} MACs, not {expected.macs:,}"
    except PlanError as error:
        return reason_of(error)
    except ModelError as error:
        return f"the network does not run with factors in its place ({reason_of(error.__cause__ or error)})"
    return f"with factors in its place the network has {cost.params:,} parameters, not {expected.params:,}"


def _culprits(
    model: nn.Module, plan: Plan, inputs: Inputs, steps: Sequence[LayerPlan | Narrowing], outcome: str
) -> dict[str, str]:
    """The layers and channel sets because of which a plan fails, among some that fail together."""
    if len(steps) == 1:
        return {_called(steps[0]): outcome}
    refused: dict[str, str] = {}
    for half in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
        told = _tried(model, _restricted(plan, half), inputs)
        if isinstance(told, str):
            refused.update(_culprits(model, plan, inputs, half, told))
    # neither half fails alone: they do together, and all of them have to stay
    return refused or dict.fromkeys(map(_called, steps), outcome)


def _called(step: LayerPlan | Narrowing) -> str:
    """What a refusal calls a layer or a channel set."""
    return step.name if isinstance(step, LayerPlan) else channels_named(step.name)


def _restricted(plan: Plan, steps: Sequence[LayerPlan | Narrowing]) -> Plan:
    """A plan with some of its steps alone."""
    narrowings = tuple(one for one in steps if isinstance(one, Narrowing))
    layers = tuple(one for one in steps if isinstance(one, LayerPlan))
    names = [layer.name for layer in layers] + [name for one in narrowings for name in one.channels.layers]
    return replace(plan, layers=layers, narrowings=narrowings, opened=within(plan.opened, names))


def _expected(model: nn.Module, plan: Plan, inputs: Inputs) -> Cost:
    """What the network costs that a plan, or part of one, makes: its layers' costs are those in the whole plan."""
    if not plan.narrowings:
        start = cost_of(opened_for(model, plan), inputs) if plan.opened else plan.before
        return reduce(Cost.__add__, (layer.after - layer.before for layer in plan.decomposed), start)
    dense = narrow_(open_(duplicate(model), plan.opened), plan.narrowings)
    cost = cost_of(dense, inputs)
    for layer, shape in _served(dense, plan, inputs).items():
        wiring, ranks, itemsize = _wiring(layer, shape), list(layer.ranks), layer.before.bytes // layer.before.params
        params = int(wiring.params(shape, ranks)) - shape.params
        cost = cost + Cost(params, int(wiring.macs(shape, ranks)) - shape.macs, params * itemsize)
    return cost


def _as_planned(model: nn.Module, plan: Plan, inputs: Inputs, cost: Cost) -> bool:
    """Whether a network costs what its plan says; MACs of routed layers depend on what goes in."""
    opened = cost_of(opened_for(model, plan), inputs) - plan.before if plan.opened else Cost(0, 0, 0)
    off = cost - plan.after - opened
    routed = any(layer.kind == "Stack" for layer in plan.layers)
    return (off.params, off.bytes) == (0, 0) and (off.macs == 0 or routed)


def _served(dense: nn.Module, plan: Plan, inputs: Inputs) -> dict[LayerPlan, LayerShape]:
    """The shapes of the decomposed layers, with the calls they serve in a network that still has them whole."""
    places = {layer: [dense.get_submodule(path) for path in (layer.name, *layer.aliases)] for layer in plan.decomposed}
    calls = uses(dense, inputs, [module for group in places.values() for module in dict.fromkeys(group)]).calls
    served = {}
    for layer, group in places.items():
        own: tuple[Call, ...] = tuple(call for module in dict.fromkeys(group) for call in calls[module])
        served[layer] = replace(shape_of(group[0]), calls=own)
    return served


def _wiring(layer: LayerPlan, shape: LayerShape) -> Wiring:
    return wiring_of(cast(str, layer.decomposition), shape)


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
