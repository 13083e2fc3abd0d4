"""What fine-tuning lowers: the task's loss, and distances from a teacher in outputs, layers and weights.

    L = a L_task + b T² KL(teacher ‖ student at temperature T) + c Σ_i ‖W_i − Ŵ_i‖² + d Σ_i ‖O_i(x) − D_i(x)‖²

The last two are L_diss of arXiv 2409.03555: W_i and O_i are the weight and the output of the original's i-th decomposed
layer, Ŵ_i and D_i those of its factors; layers that lost channels have no match and are left out. They need the
original as the teacher, the second term any network that gives the same classes (Hinton et al., arXiv 1503.02531). Each
is a mean over entries and layers, or a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.decompositions import reconstruct, wiring_of
from rankfold.errors import TrainingError
from rankfold.network.hooks import attached
from rankfold.network.kinds import shape_of, stage_factors, weight_of
from rankfold.network.passes import Inputs, arguments_of, examples_in, output_of
from rankfold.plan import LayerPlan, Plan
from rankfold.search.network_objectives import over_classes, softened
from rankfold.training.geometry import check_place, opened_original


@dataclass(frozen=True)
class Losses:
    """The weights of the terms, zero for those that are left out.

    `criterion` is the task's loss of outputs and targets, cross-entropy where none is given. `reduction` of the two
    terms over layers is "mean" or "sum": over entries and layers, or over all but the batch, of which it is the mean.
    """

    task: float = 1.0
    logits: float = 1.0
    temperature: float = 4.0
    weights: float = 0.0
    outputs: float = 0.0
    reduction: str = "mean"
    criterion: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise TrainingError(f"reduction {self.reduction!r} is neither 'mean' nor 'sum'")
        given = {name: getattr(self, name) for name in ("task", "logits", "weights", "outputs")}
        negative = [name for name, value in given.items() if value < 0]
        if negative:
            raise TrainingError(
                f"the weight of the {negative[0]} loss is {given[negative[0]]}; it must not be negative"
            )
        if not any(given.values()):
            raise TrainingError("every loss has weight zero; give one of task, logits, weights and outputs a weight")

    @property
    def by_layer(self) -> bool:
        """Whether a term goes by layers, which needs the original as the teacher."""
        return self.weights > 0 or self.outputs > 0

    @property
    def taught(self) -> bool:
        """Whether a term needs a pass of the teacher."""
        return self.logits > 0 or self.outputs > 0


class Distillation:
    """The terms for a student and its teacher, which is run in evaluation mode and gets no gradients."""

    def __init__(self, losses: Losses, student: nn.Module, teacher: nn.Module | None, plan: Plan | None) -> None:
        if losses.taught and teacher is None:
            raise TrainingError("losses of logits and outputs need a teacher; give one, or set their weights to zero")
        if losses.by_layer and (teacher is None or plan is None):
            raise TrainingError("losses by layer need the original as the teacher, and the plan of its layers")
        if losses.by_layer and teacher is not None and plan is not None:
            teacher = opened_original(teacher, plan)
        self.losses, self.student, self.teacher = losses, student, teacher
        self.layers = tuple(one for one in plan.decomposed if not one.narrowed) if plan and losses.by_layer else ()
        if losses.by_layer and plan and plan.changed and not self.layers:
            raise TrainingError("no layer is decomposed and as wide as it was; set the losses by layer to zero")
        for layer in self.layers:
            check_place(cast(nn.Module, teacher), layer, "make it the teacher, or set the losses by layer to zero")

    def __call__(self, run: Callable[..., Any], x: Inputs, y: Tensor) -> dict[str, Tensor]:
        """The weighted terms for a batch, by name; `run` is the student, wrapped or not."""
        losses, terms = self.losses, {}
        args, kwargs = arguments_of(x)
        with self._outputs(self.student) as own:
            output = run(*args, **kwargs)
        taught, theirs = None, {}
        if losses.taught:
            with torch.no_grad(), self._outputs(cast(nn.Module, self.teacher)) as theirs:
                taught = cast(nn.Module, self.teacher)(*args, **kwargs)
        if losses.task:
            terms["task"] = losses.task * (losses.criterion or _cross_entropy)(output, y)
        if losses.logits:
            terms["logits"] = losses.logits * apart(output, taught, losses.temperature)
        if losses.weights:
            terms["weights"] = losses.weights * self._over_layers(self._weight_distance)
        if losses.outputs:
            distances = {name: self._distance(own[name], theirs[name], examples_in(x)) for name in own}
            terms["outputs"] = losses.outputs * self._over_layers(lambda layer: distances[layer.name])
        return terms

    def _over_layers(self, distance: Callable[[LayerPlan], Tensor]) -> Tensor:
        found = torch.stack([distance(layer) for layer in self.layers])
        return found.mean() if self.losses.reduction == "mean" else found.sum()

    def _weight_distance(self, layer: LayerPlan) -> Tensor:
        """‖W − Ŵ‖² of a layer."""
        module = cast(nn.Module, self.teacher).get_submodule(layer.name)
        wiring = wiring_of(cast(str, layer.decomposition), shape_of(module))
        factors = stage_factors(self.student.get_submodule(layer.name), module, wiring, layer.ranks)
        return self._distance(reconstruct(wiring, factors), weight_of(module), 1)

    def _distance(self, own: Tensor, other: Tensor, batch: int) -> Tensor:
        squares = (own.float() - other.float()).square()
        return squares.mean() if self.losses.reduction == "mean" else squares.sum() / batch

    @contextmanager
    def _outputs(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """What the decomposed layers, or those they stand for, give in a pass."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda module, args, output: seen.__setitem__(name, output.clone())  # a ReLU may overwrite it

        with attached(
            model.get_submodule(layer.name).register_forward_hook(keep(layer.name))
            for layer in (self.layers if self.losses.outputs else ())
        ):
            yield seen


def apart(output: Any, taught: Any, temperature: float = 1.0) -> Tensor:
    """How far a network's output is from its teacher's: the divergence of distributions over classes, per row.

    Hidden states, and outputs of a single column, are no such thing: of them it is the squared relative error.
    """
    own, other = output_of(output), output_of(taught)
    hidden = hasattr(taught, "last_hidden_state") and not hasattr(taught, "logits")
    if over_classes(other) and not hidden:
        return softened(own, other, temperature)
    return (own - other).float().square().sum() / other.float().square().sum().clamp_min(1e-30)


def _cross_entropy(output: Any, y: Tensor) -> Tensor:
    """Of classes; of the next token, where outputs are distributions for as many tokens as there are labels."""
    logits = output_of(output).float()
    if logits.ndim == 3 and logits.shape[:2] == y.shape:
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
    return functional.cross_entropy(logits, y)
