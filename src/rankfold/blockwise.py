"""Networks block by block: what is measured of each alone, one plan for all of them, and what becomes of each.

Nothing here asks for the whole network: a block is a network of its own, whose inputs are what reaches it. Errors are
weighed by what they cost the block's output, which a transformer's blocks hand on with little added: relative squared
errors of that stream are what is summed over blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from torch import nn

from rankfold.budget import Budget, Cost
from rankfold.calibration.asked import calibrated
from rankfold.calibration.moments import Calibration
from rankfold.decompositions.interpolative import Elimination
from rankfold.decompositions.wiring import Call, LayerShape
from rankfold.memory import trim
from rankfold.network.costs import cost_of
from rankfold.network.finding import Layers, find_layers
from rankfold.network.opening import Opened, opened, within
from rankfold.network.passes import Inputs
from rankfold.network.rehearsal import rehearse
from rankfold.network.surgery import apply_plan
from rankfold.plan import ChannelSet, LayerPlan, LayerSpec, Narrowing, Plan, Port, channels_named
from rankfold.planning import Decompositions, assign, drawn_up, irreplaceable, measure, outcome, pose
from rankfold.progress import Progress, silent
from rankfold.search import search as known_search
from rankfold.search import settle
from rankfold.search.curves import Curve, Fit, Price, subset
from rankfold.search.prices import priced
from rankfold.search.units import UnitCurve
from rankfold.search.widths import Width
from rankfold.units import about_means, hidden_channels, measure_widths, united, with_metric

PRICED = 2
"""Batches on which errors are priced."""


@dataclass(frozen=True)
class BlockCurves:
    """What is kept of a block once it is measured: curves of what can become of it, without weights or moments.

    `cost` is what the block costs in a pass over the first batch.
    """

    curves: tuple[Curve, ...]
    layers: Layers
    openings: Mapping[str, Any]
    cost: Cost

    def plan(self, pairs: Sequence[tuple[Curve, int]], budget: Budget) -> Plan:
        """The plan of the block with the chosen candidates of the curves that have a choice."""
        plan = drawn_up(pairs, self.curves, self.layers, pose(self.curves, self.cost, budget), {})
        return replace(plan, opened=within(self.openings, [layer.name for layer in plan.changed]))


KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        BlockCurves,
        Call,
        ChannelSet,
        Cost,
        Curve,
        Elimination,
        Fit,
        LayerShape,
        LayerSpec,
        Layers,
        Port,
        Price,
        UnitCurve,
        Width,
    )
}
"""What `BlockCurves` are made of, by name."""


def measure_block(
    block: nn.Module,
    batches: Sequence[Inputs],
    *,
    decomposition: Decompositions,
    budget: Budget,
    align: int,
) -> BlockCurves:
    """The curves of a block on the inputs that reach it; each of its layers is measured and let go in turn.

    What a rehearsal of the smallest plan shows not to be replaceable stays as it is.
    """
    whole, layers, choices = _seen(block, batches, decomposition)
    model, sets = whole.model, hidden_channels(whole.model, batches[0], layers, choices)
    known = _calibrated(model, with_metric(layers, choices, sets), batches)
    moments, judged = known.moments, (known.held or list(known.inputs))[:PRICED]
    ordering, _ = about_means(model, batches[0], moments, sets.found, in_order=False)
    widths, layers = measure_widths(model, layers, sets, align=align, moments=ordering)
    curves: list[Curve] = []
    for layer in layers.found:
        own = Layers((layer,), {})
        measured = measure(model, own, choices, units=budget.units, moments=moments, align=align)
        measured, _ = priced(model, measured, (), moments, judged, classes=False)
        curves += [replace(one, weight=None, moments={}, exact=None) for one in measured]
        trim()
    dense = [subset(one, np.array([0])) for one in curves]
    _, widths = priced(model, dense, widths, moments, judged, classes=False)
    refused: dict[str, str] = {}
    cost = cost_of(block, batches[0])
    while True:
        sound = [one for one in widths if channels_named(one.channels.name) not in refused]
        left = united(curves, sound, refused, budget)
        if not left:
            raise irreplaceable(refused)
        found = BlockCurves(tuple(left), layers.without(refused), whole.openings, cost)
        smallest = found.plan([(curve, len(curve) - 1) for curve in left if len(curve) > 1], budget)
        told = rehearse(block, smallest, batches[0]).refused
        if not told:
            return found
        refused |= told


def plan_blocks(
    blocks: Mapping[str, BlockCurves], before: Cost, budget: Budget, progress: Progress = silent
) -> tuple[dict[str, Plan], dict[str, Any]]:
    """A plan for every block, by its name, all of them together within the budget; and how they were found.

    `before` is what the whole network costs. Raises BudgetError where there is no plan.
    """
    every = [curve for block in blocks.values() for curve in block.curves]
    problem = pose(every, before, budget)
    progress("searching ranks", 0, 1)
    selection = settle(problem, known_search("exact"), progress)
    progress("searching ranks", 1, 1)
    chosen = iter(zip(selection.curves or problem.curves, selection.choices, strict=True))
    found = {
        name: block.plan([next(chosen) for curve in block.curves if len(curve) > 1], budget)
        for name, block in blocks.items()
    }
    return found, {"search": "exact, block by block", **outcome(problem, selection, budget), "priced": True}


def fit_block(
    block: nn.Module,
    plan: Plan,
    batches: Sequence[Inputs],
    *,
    decomposition: Decompositions,
) -> tuple[nn.Module, Plan]:
    """What a plan makes of a block, fitted by the inputs that reach it, and the plan with the errors reached."""
    if not plan.changed:
        return block, plan
    whole, layers, _ = _seen(block, batches, decomposition)
    known = _calibrated(whole.model, layers, batches)
    sets = [one.channels for one in plan.narrowings]
    _, rebuilding = about_means(whole.model, batches[0], known.moments, sets, in_order=False)
    student, reached = apply_plan(block, plan, moments=known.moments, rebuilding=rebuilding)
    told = known.approximate
    return student, replace(reached, settings={"approximate_moments": dict(told)} if told else {})


def whole_plan(plans: Mapping[str, Plan], before: Cost, settings: Mapping[str, Any]) -> Plan:
    """One plan of those of blocks, in the names that layers have in the network."""
    after = reduce(Cost.__add__, (plan.after - plan.before for plan in plans.values()), before)
    approximate = {
        f"{name}.{layer}": told
        for name, plan in plans.items()
        for layer, told in plan.settings.get("approximate_moments", {}).items()
    }
    return Plan(
        tuple(_layer_in(name, layer) for name, plan in plans.items() for layer in plan.layers),
        {f"{name}.{layer}": reason for name, plan in plans.items() for layer, reason in plan.skipped.items()},
        before,
        after,
        {**settings, **({"approximate_moments": approximate} if approximate else {})},
        opened={f"{name}.{one}": how for name, plan in plans.items() for one, how in plan.opened.items()},
        narrowings=tuple(_narrowing_in(name, one) for name, plan in plans.items() for one in plan.narrowings),
    )


def _seen(
    block: nn.Module, batches: Sequence[Inputs], decomposition: Decompositions
) -> tuple[Opened, Layers, Mapping[str, Sequence[str]]]:
    """A block opened, its layers, and what each of them may become."""
    whole = opened(block, batches[0])
    choices, layers = assign(find_layers(whole.model, batches[0], closed=whole.closed), decomposition)
    return whole, layers, choices


def _calibrated(model: nn.Module, layers: Layers, batches: Sequence[Inputs]) -> Calibration:
    """The moments of some layers, on all but the batches that are held back to price errors on."""
    return calibrated(model, layers, batches[0], batches, samples=None, of_weights=False, progress=silent)


def _layer_in(block: str, layer: LayerPlan) -> LayerPlan:
    return replace(layer, name=f"{block}.{layer.name}", aliases=tuple(f"{block}.{alias}" for alias in layer.aliases))


def _narrowing_in(block: str, one: Narrowing) -> Narrowing:
    channels = one.channels
    made, read = (
        tuple(replace(port, layer=f"{block}.{port.layer}") for port in ports)
        for ports in (channels.producers, channels.consumers)
    )
    between = tuple(f"{block}.{name}" for name in channels.between)
    named = replace(channels, name=f"{block}.{channels.name}", producers=made, consumers=read, between=between)
    return replace(one, channels=named)
