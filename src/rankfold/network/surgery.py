"""Surgery: a plan turned into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from rankfold.decompositions import Factors, fit, metric_error, wiring_of
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.errors import PlanError
from rankfold.network.copies import duplicate, needs_copy, replaced, sharing
from rankfold.network.kinds import factorised, kind_of, shape_of, stage_weights, weight_of
from rankfold.network.layouts import empty_factors
from rankfold.network.narrowing import narrow_, narrowed_error, narrowed_moment, rebuild_
from rankfold.network.opening import open_
from rankfold.network.passes import device_of
from rankfold.plan import LayerPlan, Plan
from rankfold.progress import Progress, silent
from rankfold.sharing import shared


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    factors: Mapping[str, Factors] | None = None,
    moments: Mapping[str, Moment] | None = None,
    rebuilding: Mapping[str, Moment] | None = None,
    progress: Progress = silent,
) -> tuple[nn.Module, Plan]:
    """A copy of the model with the plan's layers factorised, and the plan with the errors that were reached.

    The original is untouched. `factors` are those already at hand, by layer name; others are fitted, in the metric of
    the layer's entry in `moments` if it has one. Channels that are gone are rebuilt by the moments in `rebuilding`,
    where they are other ones: about the mean, which a bias then takes. Raises PlanError where the plan does not fit the
    model.
    """
    whole = opened_for(model, plan)
    student = open_(duplicate(model), plan.opened)
    if plan.narrowings:
        student = narrow_(student, plan.narrowings)
        rebuild_(student, whole, plan, rebuilding if rebuilding is not None else moments or {})
    at_hand = {**(factors or {}), **_fitted(student, whole, plan, factors or {}, moments or {}, progress)}
    reached = []
    for layer in plan.layers:
        known = (moments or {}).get(layer.name, IDENTITY)
        if layer.decomposition is None:
            lost = narrowed_error(whole, student, plan, layer, known) if layer.narrowed else 0.0
            reached.append(replace(layer, error=lost))
            continue
        module = _submodule(student, layer)
        shape = shape_of(module)
        wiring = wiring_of(layer.decomposition, shape)
        weight = weight_of(module)
        found = at_hand[layer.name]
        stored = tuple(factor.to(weight.dtype).double() for factor in found)
        student = swapped(student, layer, found)
        if layer.narrowed:
            reached.append(replace(layer, error=narrowed_error(whole, student, plan, layer, known)))
        else:
            reached.append(replace(layer, error=metric_error(weight, wiring, stored, known)))
    return student, plan.with_layers(tuple(reached))


def _fitted(
    student: nn.Module,
    whole: nn.Module,
    plan: Plan,
    factors: Mapping[str, Factors],
    moments: Mapping[str, Moment],
    progress: Progress,
) -> dict[str, Factors]:
    """The factors of the plan's layers that are not at hand, fitted to the weights of a student without any."""
    missing = [layer for layer in plan.decomposed if layer.name not in factors]

    def fitted(layer: LayerPlan) -> Factors:
        module, known = _submodule(student, layer), moments.get(layer.name, IDENTITY)
        return fit(
            cast(str, layer.decomposition),
            weight_of(module),
            shape_of(module),
            layer.ranks,
            layer=layer.name,
            starts=layer.starts,
            moment=narrowed_moment(known, whole, plan, layer),
        )

    made = shared(missing, fitted, partial(progress, "fitting factors"), device=device_of(whole) or "cpu")
    return {layer.name: found for layer, found in zip(missing, made, strict=True)}


def rebuilt(model: nn.Module, plan: Plan) -> nn.Module:
    """A freshly built model with the plan's factorised modules, weights uninitialised, in place; returns the root.

    Raises PlanError where the plan does not fit the model.
    """
    try:
        model = narrow_(open_(model, plan.opened), plan.narrowings)
    except (AttributeError, KeyError) as error:
        raise PlanError(f"the plan does not fit the model: {error}") from error
    for layer in plan.decomposed:
        module = _submodule(model, layer)
        shape = shape_of(module)
        wiring = wiring_of(cast(str, layer.decomposition), shape)
        if len(layer.ranks) != len(wiring.bonds) or min(layer.ranks) < 1:
            raise PlanError(f"{layer.name}: ranks {layer.ranks} do not fit {layer.decomposition}, bonds {wiring.bonds}")
        model = swapped(model, layer, empty_factors(shape, wiring, layer.ranks))
    return model


def opened_for(model: nn.Module, plan: Plan) -> nn.Module:
    """The original with the modules opened that a plan opens, so that the plan's layers are found in it.

    It shares its tensors with the model, which is left as it is, but for those made under inference mode.
    """
    return open_((duplicate if needs_copy(model) else sharing)(model), plan.opened) if plan.opened else model


def narrowed_for(model: nn.Module, plan: Plan) -> nn.Module:
    """The original with the layers that a plan decomposes, whole: opened, and without the channels that are gone.

    It shares what it can with the model, which is left as it is.
    """
    return narrow_(sharing(opened_for(model, plan)), plan.narrowings) if plan.narrowings else opened_for(model, plan)


def swapped(model: nn.Module, layer: LayerPlan, factors: tuple[Tensor, ...]) -> nn.Module:
    """The model with stages around one set of factors in place of a layer, at all its names; returns the root."""
    places = {path: model.get_submodule(path) for path in (layer.name, *layer.aliases)}  # before any of them is gone
    first = places[layer.name]
    wiring = wiring_of(cast(str, layer.decomposition), shape_of(first))
    weights = stage_weights(first, wiring, factors)
    stages = {module: factorised(module, wiring, layer.ranks, weights) for module in dict.fromkeys(places.values())}
    for path, module in places.items():
        model = replaced(model, path, stages[module])
        _unfuse_(model, path)
    return model


def _unfuse_(model: nn.Module, path: str) -> None:
    """Keeps PyTorch's fused encoder from reading weights at a place: it would compose and multiply by them whole."""
    parts = path.split(".")
    for depth in range(len(parts)):
        module: Any = model.get_submodule(".".join(parts[:depth]))
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _submodule(model: nn.Module, layer: LayerPlan) -> nn.Module:
    """The module a plan's layer names; raises PlanError where there is none of its kind and shape."""
    for path in (layer.name, *layer.aliases):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise PlanError(f"the plan does not fit the model: it has no layer {path!r}") from None
        kind = kind_of(module)
        if kind is None or (path == layer.name and kind.name != layer.kind):
            raise PlanError(f"{path}: the plan says {layer.kind}, the model has {type(module).__name__}")
        weight = tuple(cast(Tensor, module.weight).shape)
        if weight != layer.dense:
            raise PlanError(f"{path}: the plan says weight {layer.dense}, the model has {weight}")
    return model.get_submodule(layer.name)
