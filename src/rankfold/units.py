"""Units in the flow: channels that may go, their widths and prices, and what a chosen unit makes of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from torch import nn

from rankfold.budget import RESOURCES, UNITS, Budget, Cost, describe
from rankfold.calibration.moments import Calibration
from rankfold.calibration.store import Changed
from rankfold.decompositions import Factors
from rankfold.decompositions.metric import Moment
from rankfold.decompositions.wiring import LayerShape
from rankfold.errors import BudgetError, ModelError
from rankfold.network.channels import Channels, find_channels
from rankfold.network.costs import cost_of
from rankfold.network.finding import Layers
from rankfold.network.kinds import weight_of, weight_shape
from rankfold.network.narrowing import tried
from rankfold.network.passes import Inputs, device_of, examples_in, few, rejoined, run
from rankfold.network.timing.context import timed
from rankfold.network.tracing import followed
from rankfold.plan import INTERPOLATIVE, ChannelSet, LayerPlan, Narrowing, channels_named
from rankfold.progress import Progress, silent
from rankfold.search.candidates import at_rank_one
from rankfold.search.curves import Curve, subset
from rankfold.search.forms import cost_at
from rankfold.search.prices import TRIALS, priced
from rankfold.search.units import MANY, UnitCurve, unit_curve
from rankfold.search.widths import FINE, WIDTHS, Width, measure_width, units_of
from rankfold.sharing import shared

EXAMPLES = 64
"""Inputs on which errors are priced, at most."""
WORK = 2**43
"""MACs of all passes over them, at most, but for `FEWEST` inputs where there are channels to be weighed."""
FEWEST = 2
"""Inputs on which channels are priced, at least: what one block of text says is not so of another."""


def hidden_channels(model: nn.Module, inputs: Inputs, layers: Layers, choices: Mapping[str, Sequence[str]]) -> Channels:
    """The channel sets between layers that may be interpolative, each tried on the network; why others stay."""
    if not any(INTERPOLATIVE in names for names in choices.values()):
        return Channels((), {})
    others = {name: "it is not to be interpolative" for name, names in choices.items() if INTERPOLATIVE not in names}
    channels = find_channels(model, inputs, layers.found, {**layers.skipped, **others})
    sound, unsound = tried(model, inputs, channels.found)
    return Channels(sound, {**channels.kept, **unsound})


def timed_parts(
    original: nn.Module,
    model: nn.Module,
    inputs: Inputs,
    layers: Layers,
    channels: Channels,
    before: Cost,
    *,
    compiled: bool = False,
    progress: Progress = silent,
) -> tuple[Layers, Channels, Cost]:
    """The layers and channels of an opened network with what they take, and the original's cost with its latency."""
    found = timed(model, original, inputs, layers.found, channels.found, compiled=compiled, progress=progress)
    return (
        Layers(found.layers, {**layers.skipped, **found.untimed}),
        replace(channels, found=found.sets),
        replace(before, latency=found.total),
    )


def with_metric(layers: Layers, choices: Mapping[str, Sequence[str]], channels: Channels) -> Layers:
    """The layers whose errors are measured: those that may be factors, or read channels."""
    readers = {port.layer for one in channels.found for port in one.consumers}
    factors = {name for name, names in choices.items() if any(one != INTERPOLATIVE for one in names)}
    return Layers(tuple(one for one in layers.found if one.name in readers | factors), layers.skipped)


def about_means(
    model: nn.Module, inputs: Inputs, moments: Mapping[str, Moment], sets: Sequence[ChannelSet], *, in_order: bool
) -> tuple[Mapping[str, Moment], Mapping[str, Moment]]:
    """The moments by which channels are ordered, and those by which they are rebuilt at once.

    They are about the mean where a bias can take what the mean of the outputs loses, and for the order also where a
    batch norm will, once layers are fitted `in_order`. Those to rebuild by keep a mean where it is to be set right.
    """
    readers = {port.layer: model.get_submodule(port.layer) for one in sets for port in one.consumers}
    norms = followed(model, readers.values(), lambda: run(model, inputs))[1] if in_order and readers else {}
    biased = {name for name, module in readers.items() if getattr(module, "bias", None) is not None}
    able = biased | {name for name, module in readers.items() if module in norms}
    ordering = Changed(moments, lambda name, one: one.centred() if name in able else one)
    rebuilding = Changed(moments, lambda name, one: one.centred() if name in biased else replace(one, mean=None))
    return ordering, rebuilding


def check_reachable(
    layers: Layers, choices: Mapping[str, Sequence[str]], channels: Channels, before: Cost, budget: Budget
) -> None:
    """Raises BudgetError for less than what rank 1 in every layer leaves, and no channel in any set.

    So much is known before anything is measured. Time, and whether some plan meets a larger budget, are not.
    """
    hidden = {name for one in channels.found for name in (*one.layers, *one.between)}
    left = before
    for one in channels.found:
        left = left - one.through
    for layer in layers.found:
        least = [at_rank_one(layer, name) for name in choices[layer.name] if name != INTERPOLATIVE]
        forms = [Cost(0, 0, 0)] if layer.name in hidden else [layer.dense, *least]
        left = left - layer.dense + Cost(*(min(getattr(one, unit) for one in forms) for unit in UNITS))
    limits = {unit: most for unit, most in budget.limits(before).items() if unit in UNITS}
    over = {unit: getattr(left, unit) for unit, most in limits.items() if getattr(left, unit) > most}
    if over:
        raise BudgetError(
            f"no plan meets the budget {describe(limits, before)}: the smallest feasible one is at least "
            f"{describe(over, before)}, which is rank 1 in every layer, without the channels that may go; raise it, "
            "include more layers, or allow more decompositions"
        )


def measure_widths(
    model: nn.Module,
    layers: Layers,
    channels: Channels,
    *,
    align: int | None = None,
    moments: Mapping[str, Moment] | None = None,
    progress: Progress = silent,
) -> tuple[tuple[Width, ...], Layers]:
    """The order in which channels of every set go, with errors by width; and the layers with why others stay."""
    specs, sets = {layer.name: layer for layer in layers.found}, channels.found
    most = {one.name: WIDTHS if len(unit) < MANY else FINE for unit in units_of(sets, specs) for one in unit}

    def measured(one: ChannelSet) -> Width | str:
        weights = {port.layer: weight_of(model.get_submodule(port.layer)) for port in one.consumers}
        return measure_width(one, specs, weights, moments or {}, align=align, most=most[one.name])

    widths = shared(sets, measured, partial(progress, "ordering channels"), device=device_of(model) or "cpu")
    kept = {channels_named(one.name): found for one, found in zip(sets, widths, strict=True) if isinstance(found, str)}
    return tuple(one for one in widths if isinstance(one, Width)), layers.without(kept)


def with_prices(
    model: nn.Module, curves: Sequence[Curve], widths: Sequence[Width], known: Calibration, progress: Progress = silent
) -> tuple[tuple[Curve, ...], tuple[Width, ...]]:
    """The curves and widths with what their errors cost the network.

    It is measured on inputs that are held back from the moments, if there are any: errors on inputs that the moments
    have seen look the smaller, the fewer they are. Where outputs cannot be compared (their number depends on what is in
    them), or where passes over a single input are too long for layers alone, relative errors are summed as they are.
    """
    inputs = known.held or known.inputs
    parts = len(widths) + sum(len(curve) > 1 for curve in curves)
    try:
        (one,) = few(inputs, 1)
        passes = WORK // max(cost_of(model, one).macs * parts * len(TRIALS), 1)
        count = min(EXAMPLES, max(passes, FEWEST if widths else 0))
        if count:
            chosen = few(inputs, count)
            # errors are made anew for every batch; passes over `FEWEST` are long, and take much room
            most = 1 if count <= FEWEST else max(map(examples_in, inputs))
            chosen = rejoined(chosen, most)
            return priced(model, curves, widths, known.moments, chosen, progress=progress)
    except ModelError:
        pass
    return tuple(curves), tuple(widths)


def united(curves: Sequence[Curve], widths: Sequence[Width], refused: Mapping[str, str], budget: Budget) -> list[Curve]:
    """A curve for every unit of the given channel sets, and those of the layers that are in none.

    A layer that is refused stays dense: left out, or as part of its unit.
    """
    named = {curve.layer.name: curve for curve in curves}
    units = units_of([one.channels for one in widths], {name: curve.layer for name, curve in named.items()})
    by_name = {one.channels.name: one for one in widths}
    joined: list[Curve] = []
    inside: set[str] = set()
    for sets in units:
        touched = {name for one in sets for name in (*one.layers, *one.between)}
        members = [
            curve if curve.layer.name not in refused else subset(curve, np.array([0]))
            for curve in curves
            if curve.layer.name in touched
        ]
        inside |= touched
        joined.append(unit_curve([by_name[one.name] for one in sets], members, budget.units))
    return joined + [curve for name, curve in named.items() if name not in inside and name not in refused]


def dense_cost(curve: Curve) -> Cost:
    """What the curve's layers cost as they are."""
    return Cost(*(int(curve.costs[unit][0]) for unit in RESOURCES))


def members(curves: Iterable[Curve]) -> list[Curve]:
    """The curves of layers in all curves, of units those of their members."""
    return [one for curve in curves for one in curve.parts]


def fitted_factors(pairs: Iterable[tuple[Curve, int]], narrowed: set[str]) -> dict[str, Factors]:
    """The factors at hand of the chosen candidates; those of layers that lose channels are others."""
    found = {}
    for curve, k in pairs:
        parts = zip(curve.members, curve.forms(k), strict=True) if isinstance(curve, UnitCurve) else ((curve, k),)
        for one, form in parts:
            factors = one.factors(form)
            if factors is not None and one.layer.name not in narrowed:
                found[one.layer.name] = factors
    return found


def planned(curve: Curve, choice: int, starts: int) -> list[LayerPlan]:
    """The plan's entries for a curve's chosen candidate: one, or those of a unit's layers."""
    if not isinstance(curve, UnitCurve):
        return [_layer_plan(curve, choice, starts, curve.layer.shape, 0.0)]
    shapes, rebuilt = curve.shapes(choice), curve.rebuilt(choice)
    return [
        _layer_plan(member, form, starts, shapes[member.layer.name], rebuilt.get(member.layer.name, 0.0))
        for member, form in zip(curve.members, curve.forms(choice), strict=True)
    ]


def _layer_plan(curve: Curve, choice: int, starts: int, shape: LayerShape, rebuilt: float) -> LayerPlan:
    """The plan's entry for a layer's candidate between narrower layers; `rebuilt` is the error of its inputs."""
    layer = curve.layer
    return LayerPlan(
        name=layer.name,
        kind=layer.kind,
        weight=layer.weight,
        decomposition=curve.methods[choice],
        ranks=curve.ranks[choice],
        before=layer.dense,
        after=cost_at(curve, choice, shape),
        aliases=layer.aliases,
        predicted_error=float(curve.errors[choice]) + rebuilt,
        starts=starts,
        narrowed=() if shape == layer.shape else weight_shape(shape),
    )


def narrowings_of(curve: UnitCurve, choice: int) -> list[Narrowing]:
    """The plan's entries for the channel sets that a unit's chosen candidate narrows."""
    found = []
    for one in curve.sets:
        width, size, through = curve.widths(choice)[one.channels.name], one.channels.size, one.channels.through
        if width < size:
            after = through.times(width, size)
            error = one.errors[one.widths.index(width)]
            found.append(Narrowing(one.channels, one.elimination.kept(width), through, after, error))
    return found
