"""Surgery: a plan turned into a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from rankfold.decompositions import Factors, fit, metric_error, wiring_of
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.errors import ModelError, PlanError
from rankfold.network.kinds import LAYER_KINDS, empty_factors, factorised, shape_of, stage_weights, weight_of
from rankfold.plan import LayerPlan, Plan
from rankfold.progress import Progress, silent


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    factors: Mapping[str, Factors] | None = None,
    moments: Mapping[str, Moment] | None = None,
    progress: Progress = silent,
) -> tuple[nn.Module, Plan]:
    """A copy of the model with the plan's layers factorised, and the plan with the errors that were reached.

    The original is untouched. `factors` are those already at hand, by layer name; others are fitted, in the metric of
    the layer's entry in `moments` if it has one. Raises PlanError where the plan does not fit the model.
    """
    student = duplicate(model)
    reached = []
    for done, layer in enumerate(plan.layers):
        progress("fitting factors", done, len(plan.layers))
        if layer.decomposition is None:
            reached.append(layer)
            continue
        module = _submodule(student, layer)
        shape = shape_of(module)
        wiring = wiring_of(layer.decomposition, shape)
        weight = weight_of(module)
        found, moment = (factors or {}).get(layer.name), (moments or {}).get(layer.name, IDENTITY)
        if found is None:
            found = fit(
                layer.decomposition, weight, shape, layer.ranks, layer=layer.name, starts=layer.starts, moment=moment
            )
        stored = tuple(factor.to(weight.dtype).double() for factor in found)
        swap_(student, layer, found)
        reached.append(replace(layer, error=metric_error(weight.double(), wiring, stored, moment)))
    progress("fitting factors", len(plan.layers), len(plan.layers))
    return student, plan.with_layers(tuple(reached))


def rebuild_(model: nn.Module, plan: Plan) -> None:
    """Puts the plan's factorised modules, with uninitialised weights, into a freshly built model, in place.

    Raises PlanError where the plan does not fit the model.
    """
    for layer in plan.decomposed:
        module = _submodule(model, layer)
        shape = shape_of(module)
        wiring = wiring_of(cast(str, layer.decomposition), shape)
        if len(layer.ranks) != len(wiring.bonds) or min(layer.ranks) < 1:
            raise PlanError(f"{layer.name}: ranks {layer.ranks} do not fit {layer.decomposition}, bonds {wiring.bonds}")
        swap_(model, layer, empty_factors(shape, wiring, layer.ranks))


def swap_(model: nn.Module, layer: LayerPlan, factors: tuple[Tensor, ...]) -> None:
    """Replaces a layer, at all its names, by stages around one set of factors, in place."""
    places = {path: model.get_submodule(path) for path in (layer.name, *layer.aliases)}  # before any of them is gone
    first = places[layer.name]
    wiring = wiring_of(cast(str, layer.decomposition), shape_of(first))
    weights = stage_weights(first, wiring, factors)
    replaced = {module: factorised(module, wiring, layer.ranks, weights) for module in dict.fromkeys(places.values())}
    for path, module in places.items():
        parent_path, _, attribute = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        setattr(parent, attribute, replaced[module])
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # its fused path would read the weight of the layer that is gone


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy; raises ModelError where the model does not allow one."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied ({error}); build it anew, without hooks or open graphs"
        ) from error


def _submodule(model: nn.Module, layer: LayerPlan) -> nn.Module:
    """The module a plan's layer names; raises PlanError where there is none of its kind and shape."""
    for path in (layer.name, *layer.aliases):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise PlanError(f"the plan does not fit the model: it has no layer {path!r}") from None
        if type(module).__name__ != layer.kind or type(module) not in LAYER_KINDS:
            raise PlanError(f"{path}: the plan says {layer.kind}, the model has {type(module).__name__}")
        weight = tuple(cast(Tensor, module.weight).shape)
        if weight != layer.weight:
            raise PlanError(f"{path}: the plan says weight {layer.weight}, the model has {weight}")
    return model.get_submodule(layer.name)
