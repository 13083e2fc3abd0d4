"""Planning: which decompositions layers may take, their curves, and the plan that a search finds within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, cast

from torch import nn

from rankfold.budget import LATENCY, UNITS, Budget, Cost
from rankfold.decompositions import DECOMPOSITIONS, Factors
from rankfold.decompositions.metric import Moment
from rankfold.errors import BudgetError, ModelError, UnknownNameError
from rankfold.network.finding import Layers, matches
from rankfold.network.kinds import weight_of
from rankfold.network.opening import Opened, within
from rankfold.network.passes import Inputs, device_of
from rankfold.network.rehearsal import rehearse
from rankfold.plan import INTERPOLATIVE, LayerSpec, Plan, channels_named
from rankfold.progress import Progress, silent
from rankfold.search import Problem, Search, Selection, settle
from rankfold.search import search as known_search
from rankfold.search.candidates import measure_layer, smallest_form
from rankfold.search.curves import Curve
from rankfold.search.network_objectives import NetworkObjective
from rankfold.search.published import Published
from rankfold.search.trace import Trace
from rankfold.search.units import UnitCurve
from rankfold.search.widths import Width
from rankfold.sharing import shared
from rankfold.units import dense_cost, fitted_factors, members, narrowings_of, planned, united

Decompositions = str | Sequence[str] | Mapping[str, str | Sequence[str]]
"""A name, several to choose from layer by layer, "auto" for all, or a mapping from name patterns to any of these."""


@dataclass(frozen=True)
class Found:
    """A search's plan, its history if it keeps one, and the factors it has fitted already, by layer name."""

    plan: Plan
    trace: Trace | None
    factors: Mapping[str, Factors]


@dataclass(frozen=True)
class Task:
    """What a plan is sought for: a network on example inputs, as it is and opened, and a budget.

    `whole_choice` says that the user named the layers, embeddings among them or not; `compiled`, that latencies are
    those of compiled networks.
    """

    model: nn.Module
    inputs: Inputs
    opened: Opened
    budget: Budget
    search: str | Search
    before: Cost
    whole_choice: bool
    compiled: bool = False


def feasible_plan(
    task: Task, layers: Layers, curves: Sequence[Curve], widths: Sequence[Width] = (), *, progress: Progress = silent
) -> Found:
    """The plan a search finds, with every layer left out that rehearsing it shows not to be replaceable.

    Channels of `widths` may go, if rehearsing it does not show that the network breaks without them. Embeddings are
    decomposed where the user chose the layers, or where the budget cannot be met without. Raises BudgetError, naming
    what was left out, where there is no plan.
    """
    refused: dict[str, str] = {}
    held = {} if task.whole_choice else {c.layer.name: _EMBEDDING for c in curves if _is_lookup(c.layer)}
    if len(held) == len(curves):
        held = {}
    while True:
        gone = {**refused, **held}
        left = united(
            curves, [one for one in widths if channels_named(one.channels.name) not in gone], gone, task.budget
        )
        if not left:
            raise irreplaceable(refused)
        try:
            found = search_plan(
                left,
                layers.without(gone),
                task.before,
                budget=task.budget,
                search=task.search,
                progress=progress,
            )
        except BudgetError as error:
            if held:
                held = {}
                continue
            if not refused:
                raise
            named = ", ".join(f"{name} ({reason})" for name, reason in refused.items())
            raise BudgetError(f"{error}; these layers cannot be replaced: {named}") from None
        progress("rehearsing the plan", 0, 1)
        opened = within(task.opened.openings, [layer.name for layer in found.plan.changed])
        plan = replace(found.plan, opened=opened)
        rehearsal = rehearse(task.model, plan, task.inputs)
        progress("rehearsing the plan", 1, 1)
        if not rehearsal.refused:
            told = {"macs_depend_on_data": True} if rehearsal.depends else {}
            cost = replace(rehearsal.cost, latency=plan.after.latency)
            return replace(found, plan=replace(plan, after=cost, settings={**plan.settings, **told}))
        refused.update(rehearsal.refused)


def irreplaceable(refused: Mapping[str, str]) -> ModelError:
    """What is raised where no layer can be replaced."""
    reasons = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in refused.items())
    return ModelError(f"no layer can be replaced: {reasons}")


def placed(search: str | Search, model: nn.Module) -> str | Search:
    """The search with an objective that runs a network put on the opened one, in which the plan's layers are."""
    objective = getattr(search, "objective", None)
    if not isinstance(objective, NetworkObjective):
        return search
    return replace(cast(Any, search), objective=objective.placed_on(model))


def suited(choices: Mapping[str, tuple[str, ...]], search: str | Search, *, blind: bool) -> dict[str, tuple[str, ...]]:
    """The choices as far as a search can make them: one that looks at weights knows no units, of "auto" or the default.

    Nor are there any where the search is `blind`, with nothing known of inputs: then all channels look alike. A list of
    the user's own is taken at its word, whatever is in it.
    """
    objective = getattr(search, "objective", None)
    weights = blind or search == "evbmf" or isinstance(search, Published) or isinstance(objective, NetworkObjective)
    return {
        name: tuple(one for one in names if one != INTERPOLATIVE)
        if weights and any(names is one for one in (AUTO, DEFAULT, FAST))
        else names
        for name, names in choices.items()
    }


SELDOM = ("tt", "ring")
"""What takes half of the time of measuring, and is chosen for 14 of 560 layers beside the others: docs/choosing.md."""
EVERY = (*DECOMPOSITIONS, INTERPOLATIVE)
AUTO = tuple(name for name in EVERY if name not in SELDOM)
"""What "auto" stands for."""
DEFAULT, FAST = ("cp3", INTERPOLATIVE), ("spatial", INTERPOLATIVE)
"""What is taken where nothing is said, and where it is time that is limited: docs/choosing.md has the table."""
_EMBEDDING = "an embedding: left whole, as the budget can be met without it; include it by name to have it decomposed"


def _is_lookup(layer: LayerSpec) -> bool:
    return any(call.lookup for call in layer.shape.calls)


def usual(budget: Budget) -> tuple[str, ...]:
    """The decompositions that are taken where nothing but a budget is said."""
    return FAST if LATENCY in budget.units else DEFAULT


def assign(layers: Layers, decomposition: Decompositions) -> tuple[dict[str, tuple[str, ...]], Layers]:
    """The decompositions each layer may take, and the layers with those that may take none moved to the skipped ones.

    Raises UnknownNameError for an unknown decomposition or a pattern that matches no layer.
    """
    if not isinstance(decomposition, Mapping):
        names = _names(decomposition)
        choices = {layer.name: names for layer in layers.found}
    else:
        everything = [name for layer in layers.found for name in (layer.name, *layer.aliases)]
        for pattern in decomposition:
            if not any(matches(name, pattern) for name in everything):
                raise UnknownNameError("decomposition pattern", pattern, everything)
        choices = {
            layer.name: _names(given)
            for layer in layers.found
            for given in [_first_match(layer, decomposition)]
            if given is not None
        }
    found = tuple(layer for layer in layers.found if layer.name in choices)
    skipped = {
        layer.name: "no pattern of the decompositions matches it" for layer in layers.found if layer not in found
    }
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in {**layers.skipped, **skipped}.items())
        raise ModelError(f"the model has no layer to decompose ({reasons or 'it has no weight matrices'})")
    return choices, Layers(found, {**layers.skipped, **skipped})


def measure(
    model: nn.Module,
    layers: Layers,
    choices: Mapping[str, Sequence[str]],
    *,
    units: Sequence[str] = UNITS,
    moments: Mapping[str, Moment] | None = None,
    align: int = 1,
    progress: Progress = silent,
) -> tuple[Curve, ...]:
    """Error and cost per rank for every layer and every decomposition it may take, in its metric where it has one.

    Ranks are multiples of `align`, but on layers too small for it.
    """

    def measured(layer: LayerSpec) -> Curve:
        weight = weight_of(model.get_submodule(layer.name))
        names = [name for name in choices[layer.name] if name != INTERPOLATIVE]
        return measure_layer(layer, weight, names, units=units, moments=moments, align=align)

    def dressed(layer: LayerSpec, curve: Curve) -> Curve:
        return replace(curve, weight=weight_of(model.get_submodule(layer.name)), moments=moments or {})

    curves = shared(
        layers.found,
        measured,
        partial(progress, "measuring layers"),
        packed=lambda curve: replace(curve, weight=None, moments={}),
        unpacked=dressed,
        device=device_of(model) or "cpu",
    )
    return tuple(curves)


def make_plan(
    curves: Sequence[Curve], layers: Layers, before: Cost, *, budget: Budget, search: str | Search = "exact"
) -> Plan:
    """The plan a search finds within the budget; raises BudgetError, naming the smallest feasible one, if none is."""
    return search_plan(curves, layers, before, budget=budget, search=search).plan


def search_plan(
    curves: Sequence[Curve],
    layers: Layers,
    before: Cost,
    *,
    budget: Budget,
    search: str | Search = "exact",
    progress: Progress = silent,
) -> Found:
    """What a search finds within the budget; raises BudgetError where there is no plan.

    Where the budget limits the error, every chosen candidate is fitted before it is relied on.
    """
    progress("searching ranks", 0, 1)
    problem = pose(curves, before, budget)
    find = known_search(search) if isinstance(search, str) else search
    selection = settle(problem, find, progress)
    progress("searching ranks", 1, 1)
    pairs = list(zip(selection.curves or problem.curves, selection.choices, strict=True))
    settings = {"search": search if isinstance(search, str) else repr(search), **outcome(problem, selection, budget)}
    plan = drawn_up(pairs, curves, layers, problem, settings)
    return Found(plan, selection.trace, fitted_factors(pairs, {layer.name for layer in plan.layers if layer.narrowed}))


def outcome(problem: Problem, selection: Selection, budget: Budget) -> dict[str, Any]:
    """What a plan says of the search that found it."""
    return {
        "budget": dict(budget.given),
        "minimised": problem.minimise,
        "objective": selection.objective,
        "bound": selection.bound,
    }


def drawn_up(
    pairs: Sequence[tuple[Curve, int]],
    curves: Sequence[Curve],
    layers: Layers,
    problem: Problem,
    settings: Mapping[str, Any],
) -> Plan:
    """The plan of the chosen candidates of some curves, among all of a network's."""
    order = {layer.name: place for place, layer in enumerate(layers.found)}
    entries = [layer for curve, k in pairs for layer in planned(curve, k, problem.starts)]
    entries.sort(key=lambda layer: order.get(layer.name, 0))
    narrowings = tuple(one for curve, k in pairs if isinstance(curve, UnitCurve) for one in narrowings_of(curve, k))
    through = (one.channels.through for curve, _ in pairs if isinstance(curve, UnitCurve) for one in curve.sets)
    after = reduce(Cost.__add__, (layer.after for layer in entries), problem.fixed)
    after = reduce(Cost.__add__, through, after)
    after = reduce(Cost.__add__, (one.after - one.before for one in narrowings), after)
    hopeless = {curve.layer.name: no_gain(curve) for curve in members(curves) if len(curve) == 1}
    for layer in entries:
        hopeless.pop(layer.name, None)
    return Plan(
        tuple(entries), {**layers.skipped, **hopeless}, problem.original, after, settings, narrowings=narrowings
    )


def pose(curves: Sequence[Curve], before: Cost, budget: Budget) -> Problem:
    """The search problem of a budget: which candidate for each curve that has a choice."""
    fixed = before - reduce(Cost.__add__, map(dense_cost, curves), Cost(0, 0, 0))
    useful = tuple(curve for curve in curves if len(curve) > 1)
    kept_whole = reduce(Cost.__add__, (dense_cost(curve) for curve in curves if len(curve) == 1), Cost(0, 0, 0))
    return Problem(
        useful,
        budget.limits(before),
        fixed + kept_whole,
        before,
        error=budget.largest_error * len(members(useful)),
        minimise=budget.minimised,
    )


def no_gain(curve: Curve) -> str:
    """Why a layer has no candidate but itself, in words."""
    if not curve.tried:
        return "none of its inputs or outputs can be left out"
    forms = "; ".join(dict.fromkeys(smallest_form(curve.layer, name) for name in curve.tried))
    return f"no rank makes it smaller: {forms}"


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    """The decompositions a user's choice stands for."""
    if given == "auto":
        return AUTO
    names = (given,) if isinstance(given, str) else tuple(given)
    if not names:
        raise ModelError(f"no decomposition given; name one of {', '.join(DECOMPOSITIONS)}, {INTERPOLATIVE}, or 'auto'")
    for name in names:
        if name not in DECOMPOSITIONS and name != INTERPOLATIVE:
            raise UnknownNameError("decomposition", name, (*DECOMPOSITIONS, INTERPOLATIVE))
    return names


def _first_match(layer: LayerSpec, mapping: Mapping[str, str | Sequence[str]]) -> str | Sequence[str] | None:
    """What the first pattern that matches a layer gives it."""
    for pattern, given in mapping.items():
        if any(matches(name, pattern) for name in (layer.name, *layer.aliases)):
            return given
    return None


def told(decomposition: Decompositions, choices: Mapping[str, Sequence[str]]) -> str | list[str] | dict[str, Any]:
    """What a plan says that it chose from: what was given, or of the default what was left of it."""
    for usually in (DEFAULT, FAST):
        if decomposition is usually and not any(INTERPOLATIVE in names for names in choices.values()):
            return [name for name in usually if name != INTERPOLATIVE]
    return as_json(decomposition)


def as_json(decomposition: Decompositions) -> str | list[str] | dict[str, str | list[str]]:
    """A user's choice of decompositions in JSON's types."""
    if isinstance(decomposition, Mapping):
        return {pattern: given if isinstance(given, str) else list(given) for pattern, given in decomposition.items()}
    return decomposition if isinstance(decomposition, str) else list(decomposition)
