"""Training factors as what they stand for: a weight.

A step along the factors' own gradients moves the weight far in some directions and hardly in others, by how large the
other factors are and by how far their terms cancel: one learning rate improves the factors of one decomposition and
destroys those of another. So CP layers are refitted before training, at nearly the same weights, to terms that cancel
less; and gradients are scaled to be those of the weight, projected on what the factors can change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rankfold.decompositions import damped, scaled_gradients, wiring_of
from rankfold.errors import TrainingError
from rankfold.layers import as_factors, as_stage_weights, shape_of, weights_of_stages
from rankfold.plan import LayerPlan, Plan
from rankfold.wiring import LayerShape, Wiring

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
    """The decomposed layers of a student, which is `original` as `plan` compressed it; one at least."""

    def __init__(self, student: nn.Module, original: nn.Module, plan: Plan) -> None:
        self.layers = []
        for layer in plan.decomposed:
            check_place(original, layer)
            shape = shape_of(original.get_submodule(layer.name))
            wiring = wiring_of(cast(str, layer.decomposition), shape)
            weights = weights_of_stages(student.get_submodule(layer.name))
            self.layers.append(_Factorised(weights, shape, wiring, layer.ranks))

    @torch.no_grad()
    def damp_(self, damping: float) -> None:
        """Refits CP layers to nearly the weights they have, so that ‖W − Ŵ‖² + damping Σ_r ‖term r‖² is least."""
        for layer in self.layers:
            found = damped(layer.wiring, layer.factors([weight.double() for weight in layer.weights]), damping)
            for weight, new in zip(layer.weights, as_stage_weights(layer.shape, layer.wiring, found), strict=True):
                weight.copy_(new)

    @torch.no_grad()
    def scale_(self) -> Tensor:
        """Scales the gradients of the factors; the squared norm of what they stand for, Σ ⟨old, new⟩."""
        energies = [self.layers[0].weights[0].new_zeros(())]
        for layer in self.layers:
            if any(weight.grad is None for weight in layer.weights):
                continue  # frozen
            dtype = torch.promote_types(layer.weights[0].dtype, torch.float32)
            gradients = [cast(Tensor, weight.grad).to(dtype) for weight in layer.weights]
            factors = layer.factors([weight.to(dtype) for weight in layer.weights])
            scaled = scaled_gradients(layer.wiring, factors, layer.factors(gradients), RIDGE)
            back = as_stage_weights(layer.shape, layer.wiring, scaled)
            for weight, old, new in zip(layer.weights, gradients, back, strict=True):
                energies.append((old * new).sum().to(energies[0]))
                cast(Tensor, weight.grad).copy_(new)
        return torch.stack(energies).sum()

    @property
    def parameters(self) -> set[nn.Parameter]:
        """The weights of all stages."""
        return {weight for layer in self.layers for weight in layer.weights}


def check_place(model: nn.Module, layer: LayerPlan) -> None:
    """Raises TrainingError where the model has no such layer as the plan's."""
    try:
        weight = tuple(cast(Tensor, model.get_submodule(layer.name).weight).shape)
    except AttributeError:
        weight = ()
    if weight != layer.weight:
        raise TrainingError(
            f"{layer.name}: the network taken for the original has no such layer of weight {layer.weight}; give the "
            "one that the plan is of, or leave out the plan and the losses by layer"
        )
