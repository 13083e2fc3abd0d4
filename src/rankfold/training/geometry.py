"""Training factors as what they stand for: a weight.

A step along the factors' own gradients moves the weight far in some directions and hardly in others, by how large the
other factors are and by how far their terms cancel: one learning rate improves the factors of one decomposition and
destroys those of another. So CP layers are refitted before training, at nearly the same weights, to terms that cancel
less; and gradients are scaled to be those of the weight, projected on what the factors can change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rankfold.decompositions import damped, is_polyadic, scaled_gradients, wiring_of
from rankfold.decompositions.wiring import LayerShape, Wiring
from rankfold.errors import PlanError, TrainingError
from rankfold.network.kinds import known_kind, shape_of, weights_of_stages
from rankfold.network.layouts import as_factors, as_stage_weights, empty_factors, write_factors_
from rankfold.network.surgery import narrowed_for, opened_for
from rankfold.plan import LayerPlan, Plan

RIDGE = 0.01
"""Share of its mean diagonal that is added to a Gram matrix before gradients are divided by it."""


@dataclass(frozen=True)
class _Factorised:
    """The stages' weights of a decomposed layer, and how they make up factors."""

    weights: list[nn.Parameter]
    shape: LayerShape
    wiring: Wiring
    ranks: tuple[int, ...]

    def factors(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return as_factors(tensors, self.shape, self.wiring, self.ranks)


class Geometry:
    """The decomposed layers of a student, which is `original` as `plan` compressed it; the plan has at least one.

    `parameters` are the weights of all their stages.
    """

    def __init__(self, student: nn.Module, original: nn.Module, plan: Plan) -> None:
        original = _of_plan(narrowed_for, original, plan)
        self.layers = [_factorised(student, original, layer) for layer in plan.decomposed]
        self.parameters = {weight for layer in self.layers for weight in layer.weights}

    @torch.no_grad()
    def damp_(self, damping: float) -> None:
        """Refits CP layers that are trained to nearly the weights Ŵ they have.

        ‖Ŵ − Ŵ′‖² + damping Σ_r ‖term r of Ŵ′‖² of the new factors' weight Ŵ′ is least.
        """
        for layer in self.layers:
            if not is_polyadic(layer.wiring) or not all(weight.requires_grad for weight in layer.weights):
                continue
            found = damped(layer.wiring, layer.factors([weight.cpu().double() for weight in layer.weights]), damping)
            write_factors_(layer.weights, layer.shape, layer.wiring, found)

    @torch.no_grad()
    def scale_(self) -> Tensor:
        """Scales the gradients of the factors; Σ ⟨gradient, scaled gradient⟩ over all of them.

        That is Σ ‖P G‖² of the weights' gradients G and their projections P on what single factors can change.
        """
        dtype = torch.promote_types(self.layers[0].weights[0].dtype, torch.float32)
        energies = []
        for layer in self.layers:
            held = [weight.to(dtype) for weight in layer.weights]
            gradients = [
                torch.zeros_like(one) if weight.grad is None else weight.grad.to(dtype)
                for weight, one in zip(layer.weights, held, strict=True)
            ]
            scaled = scaled_gradients(layer.wiring, layer.factors(held), layer.factors(gradients), RIDGE)
            back = as_stage_weights(layer.shape, layer.wiring, scaled)
            for weight, old, new in zip(layer.weights, gradients, back, strict=True):
                energies.append((old * new).sum())
                if weight.grad is not None:
                    weight.grad.copy_(new)
        return torch.stack(energies).sum()


def opened_original(model: nn.Module, plan: Plan) -> nn.Module:
    """The network that a plan is of, with what the plan opens opened; raises TrainingError where it is another one."""
    return _of_plan(opened_for, model, plan)


def _of_plan(make: Callable[[nn.Module, Plan], nn.Module], model: nn.Module, plan: Plan) -> nn.Module:
    try:
        return make(model, plan)
    except (AttributeError, KeyError, TypeError, PlanError) as error:
        raise TrainingError(
            f"the network taken for the original is not the one that the plan is of: {error}"
        ) from error


def check_place(model: nn.Module, layer: LayerPlan, advice: str) -> None:
    """Raises TrainingError, with the advice, where the model has no such layer as the plan's."""
    try:
        module = model.get_submodule(layer.name)
        found = (known_kind(module).name, tuple(cast(Tensor, module.weight).shape))
    except AttributeError:
        found = ("", ())
    if found != (layer.kind, layer.dense):
        raise TrainingError(
            f"{layer.name}: the network taken for the original has no {layer.kind} of weight {layer.dense} there; "
            f"{advice}"
        )


def _factorised(student: nn.Module, original: nn.Module, layer: LayerPlan) -> _Factorised:
    """A layer's place in the student; raises TrainingError where it is not the plan's."""
    check_place(original, layer, "give the one that the plan is of as `original`, or leave out the plan")
    shape = shape_of(original.get_submodule(layer.name))
    wiring = wiring_of(cast(str, layer.decomposition), shape)
    try:
        weights = weights_of_stages(student.get_submodule(layer.name))
    except AttributeError:
        weights = []
    expected = [one.shape for one in as_stage_weights(shape, wiring, empty_factors(shape, wiring, layer.ranks))]
    if [weight.shape for weight in weights] != expected:
        raise TrainingError(
            f"{layer.name}: the student does not have the plan's {layer.decomposition} of ranks {layer.ranks} there; "
            "give the network and the plan of one compression, or leave out the plan"
        )
    return _Factorised(weights, shape, wiring, layer.ranks)
