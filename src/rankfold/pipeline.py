"""The whole flow, top to bottom: a network and a budget in, a smaller network and the plan that made it out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from torch import nn

from rankfold.budget import UNITS, Budget, Cost
from rankfold.calibration.forward_order import refit_
from rankfold.calibration.moments import Calibration, calibrate
from rankfold.calibration.synthetic import advice, synthetic_like
from rankfold.decompositions import DECOMPOSITIONS, Factors
from rankfold.decompositions import decomposition as known_decomposition
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.errors import ModelError, RankfoldError, UnknownNameError
from rankfold.network.costs import cost_of
from rankfold.network.finding import Layers, check_model, find_layers, matches
from rankfold.network.kinds import weight_of
from rankfold.network.passes import Inputs, run
from rankfold.network.surgery import apply_plan
from rankfold.plan import LayerPlan, LayerSpec, Plan
from rankfold.progress import Progress, silent
from rankfold.search import Problem, Search, settle
from rankfold.search import search as known_search
from rankfold.search.candidates import measure_layer, smallest_form
from rankfold.search.curves import Curve
from rankfold.search.trace import Trace

Decompositions = str | Sequence[str] | Mapping[str, str | Sequence[str]]
"""A name, several to choose from layer by layer, "auto" for all, or a mapping from name patterns to any of these."""


@dataclass(frozen=True)
class Result:
    """A compressed network and what was done to it.

    `before` and `after` are costs of the whole network, `seconds` the wall time of the compression; the plan holds the
    same layer by layer. `trace` is the history of the search, where it keeps one.
    """

    model: nn.Module
    plan: Plan
    seconds: float
    trace: Trace | None = None

    @property
    def before(self) -> Cost:
        """Cost of the original network."""
        return self.plan.before

    @property
    def after(self) -> Cost:
        """Cost of the compressed network, measured on it."""
        return self.plan.after


@dataclass(frozen=True)
class Found:
    """A search's plan, its history if it keeps one, and the factors it has fitted already, by layer name."""

    plan: Plan
    trace: Trace | None
    factors: Mapping[str, Factors]


def compress(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    decomposition: Decompositions = "tucker",
    budget: Budget,
    search: str | Search = "exact",
    calibration: str | Calibration | Iterable[Any] | None = "auto",
    calibration_samples: int | None = None,
    sequential: bool = True,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    progress: Progress = silent,
) -> Result:
    """A smaller network within `budget`, with a rank chosen for every layer; `model` is left untouched.

    `search` is a name of `rankfold.search.SEARCHES`, or a search of your own settings, such as `Rene(...)`.

    `example_inputs` is a tensor, a tuple of positional or a dict of keyword arguments; MACs are counted for one pass
    over them, so give a batch of one to read them per example. `include` and `exclude` are glob patterns over layer
    names.

    With `calibration`, errors are those of the layers' outputs on some inputs, by which ranks are chosen and factors
    fitted: an iterable of unlabelled batches, or what `calibrate` measured on them; "synthetic" for inputs made from
    the network, `calibration_samples` of them; "none" (or None) for errors of the weights; "auto" for the one of the
    two that `rankfold.synthetic.advice` gives. Then every layer is fitted once more, in forward order, to the
    original's outputs from the compressed network's inputs, and biases and batch norms are corrected, unless
    `sequential` is false or the budget limits the error.

    The result is never over budget and no layer is larger, in the budget's units, than it was. Deterministic: the same
    network and settings give the same plan. Raises a RankfoldError that says what to change.
    """
    start = time.perf_counter()
    check_model(model)
    before = cost_of(model, example_inputs)
    layers = find_layers(model, example_inputs, include=include, exclude=exclude)
    choices, layers = assign(layers, decomposition)
    known = calibrated(
        model, layers, example_inputs, calibration, samples=calibration_samples, budget=budget, progress=progress
    )
    curves = measure(model, layers, choices, units=budget.units, moments=known.moments, progress=progress)
    found = search_plan(curves, layers, before, budget=budget, search=search, progress=progress)
    in_order = sequential and bool(known.inputs) and not math.isfinite(budget.largest_error)
    settings = {**_provenance(known, in_order), "decomposition": _as_json(decomposition)}
    plan = replace(found.plan, settings={**found.plan.settings, **settings})
    student, plan = apply_plan(model, plan, factors=found.factors, moments=known.moments, progress=progress)
    if in_order:
        plan = refit_(student, model, plan, known.inputs, moments=known.moments, progress=progress)
    measured = _verified_cost(model, student, plan, example_inputs)
    if measured != plan.after:
        raise RankfoldError(f"the plan predicts {plan.after}, the compressed model has {measured}: please report this")
    return Result(student, plan, time.perf_counter() - start, found.trace)


def calibrated(
    model: nn.Module,
    layers: Layers,
    example_inputs: Inputs,
    given: str | Calibration | Iterable[Any] | None,
    *,
    samples: int | None,
    budget: Budget,
    progress: Progress,
) -> Calibration:
    """The moments that `compress` is asked to go by; without any where errors are those of the weights."""
    if isinstance(given, Calibration):
        return given
    reason = "asked for"
    if given == "auto" and math.isfinite(budget.largest_error):
        given, reason = (
            "none",
            "the budget limits the error, which is that of the weights unless calibration is asked for",
        )
    elif given == "auto":
        given, reason = advice(model, example_inputs)
    if given is None or given == "none":
        return Calibration({}, {}, 0, "none", reason)
    if given == "synthetic":
        given = synthetic_like(model, example_inputs, samples, progress=progress)
        return calibrate(model, layers.found, given, source="synthetic inputs", reason=reason, progress=progress)
    if isinstance(given, str):
        raise UnknownNameError("calibration", given, ("auto", "none", "synthetic"))
    batches = list(given) if isinstance(given, Iterator) else given  # the fits go over them again
    return calibrate(model, layers.found, batches, reason=reason, progress=progress)


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
    progress: Progress = silent,
) -> tuple[Curve, ...]:
    """Error and cost per rank for every layer and every decomposition it may take, in its metric where it has one."""
    curves = []
    for done, layer in enumerate(layers.found):
        progress("measuring layers", done, len(layers.found))
        weight = weight_of(model.get_submodule(layer.name))
        moment = (moments or {}).get(layer.name, IDENTITY)
        curves.append(measure_layer(layer, weight, choices[layer.name], units=units, moment=moment))
    progress("measuring layers", len(layers.found), len(layers.found))
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
    chosen = selection.curves or problem.curves
    planned = tuple(_planned(curve, k, problem.starts) for curve, k in zip(chosen, selection.choices, strict=True))
    after = reduce(Cost.__add__, (layer.after for layer in planned), problem.fixed)
    settings = {
        "search": search if isinstance(search, str) else repr(search),
        "budget": dict(budget.given),
        "minimised": problem.minimise,
        "objective": selection.objective,
        "bound": selection.bound,
    }
    hopeless = {curve.layer.name: no_gain(curve) for curve in curves if len(curve) == 1}
    plan = Plan(planned, {**layers.skipped, **hopeless}, before, after, settings)
    pairs = zip(chosen, selection.choices, strict=True)
    fitted = {curve.layer.name: factors for curve, k in pairs if (factors := curve.factors(k)) is not None}
    return Found(plan, selection.trace, fitted)


def pose(curves: Sequence[Curve], before: Cost, budget: Budget) -> Problem:
    """The search problem of a budget: which candidate for each curve that has a choice."""
    dense = reduce(Cost.__add__, (curve.layer.dense for curve in curves), Cost(0, 0, 0))
    fixed = before - dense
    useful = tuple(curve for curve in curves if len(curve) > 1)
    kept_whole = reduce(Cost.__add__, (curve.layer.dense for curve in curves if len(curve) == 1), Cost(0, 0, 0))
    return Problem(
        useful,
        budget.limits(before),
        fixed + kept_whole,
        before,
        error=budget.largest_error * len(useful),
        minimise=budget.minimised,
    )


def _provenance(known: Calibration, in_order: bool) -> dict[str, Any]:
    """What the plan says of its metric, and of how factors were fitted."""
    if not known.batches:
        return {"metric": "frobenius", "calibration": known.source, "calibration_reason": known.reason}
    return {
        "metric": "second moments",
        "calibration": known.source,
        "calibration_reason": known.reason,
        "calibration_batches": known.batches,
        "calibration_samples": known.samples,
        "frobenius_layers": sorted(known.missing),
        "fitted": "in forward order" if in_order else "layer by layer",
    }


def no_gain(curve: Curve) -> str:
    """Why a layer has no candidate but itself, in words."""
    forms = "; ".join(dict.fromkeys(smallest_form(curve.layer, name) for name in curve.tried))
    return f"no rank makes it smaller: {forms}"


def _planned(curve: Curve, choice: int, starts: int) -> LayerPlan:
    """The plan's entry for a curve's chosen candidate."""
    layer = curve.layer
    params, macs = int(curve.costs["params"][choice]), int(curve.costs["macs"][choice])
    return LayerPlan(
        name=layer.name,
        kind=layer.kind,
        weight=layer.weight,
        decomposition=curve.methods[choice],
        ranks=curve.ranks[choice],
        before=layer.dense,
        after=layer.cost(params, macs),
        aliases=layer.aliases,
        predicted_error=float(curve.errors[choice]),
        starts=starts,
    )


def _verified_cost(model: nn.Module, student: nn.Module, plan: Plan, inputs: Inputs) -> Cost:
    """The student's measured cost; raises ModelError naming the layers that the model does not let be replaced."""
    try:
        return cost_of(student, inputs)
    except ModelError as error:
        broken = []
        for layer in plan.decomposed:
            alone, _ = apply_plan(model, plan.with_layers((layer,)))
            try:
                run(alone, inputs)
            except Exception:
                broken.append(layer.name)
        raise ModelError(
            f"the compressed model does not run ({error.__cause__}); the model reaches into these layers instead of "
            f"calling them: {', '.join(broken) or 'several together'}; exclude them"
        ) from error


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    """The decompositions a user's choice stands for."""
    if given == "auto":
        return tuple(DECOMPOSITIONS)
    names = (given,) if isinstance(given, str) else tuple(given)
    if not names:
        raise ModelError(f"no decomposition given; name one of {', '.join(DECOMPOSITIONS)}, or 'auto'")
    return tuple(known_decomposition(name).name for name in names)


def _first_match(layer: LayerSpec, mapping: Mapping[str, str | Sequence[str]]) -> str | Sequence[str] | None:
    """What the first pattern that matches a layer gives it."""
    for pattern, given in mapping.items():
        if any(matches(name, pattern) for name in (layer.name, *layer.aliases)):
            return given
    return None


def _as_json(decomposition: Decompositions) -> str | list[str] | dict[str, str | list[str]]:
    """A user's choice of decompositions in JSON's types."""
    if isinstance(decomposition, Mapping):
        return {pattern: given if isinstance(given, str) else list(given) for pattern, given in decomposition.items()}
    return decomposition if isinstance(decomposition, str) else list(decomposition)
