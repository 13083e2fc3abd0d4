"""What fine-tuning lowers: the task's loss, and distances from a teacher in outputs, layers and weights.

    L = a L_task + b T² KL(teacher ‖ student at temperature T) + c Σ_i ‖W_i − Ŵ_i‖² + d Σ_i ‖O_i(x) − D_i(x)‖²
        + e mean_k ‖B_k(x) − B̂_k(x)‖² / E‖B_k‖²

The third and fourth are L_diss of arXiv 2409.03555: W_i and O_i are the weight and the output of the original's i-th
decomposed layer, Ŵ_i and D_i those of its factors; layers that lost channels have no match and are left out. Each is a
mean over entries and layers, or a sum. The last is the mean over the blocks around all that was changed. They need the
original as the teacher, the second term any network that gives the same classes (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.decompositions import reconstruct, wiring_of
from rankfold.errors import TrainingError
from rankfold.network.blocks import first_tensor
from rankfold.network.hooks import attached
from rankfold.network.kinds import shape_of, stage_factors, weight_of
from rankfold.network.passes import Inputs, arguments_of, examples_in, output_of
from rankfold.plan import LayerPlan, Plan
from rankfold.search.network_objectives import over_classes, softened
from rankfold.training.block_targets import BlockTarget, block_targets
from rankfold.training.geometry import check_place, opened_original

_TERMS = ("task", "logits", "weights", "outputs", "blocks")


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
    blocks: float = 0.0
    reduction: str = "mean"
    criterion: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise TrainingError(f"reduction {self.reduction!r} is neither 'mean' nor 'sum'")
        given = {name: getattr(self, name) for name in _TERMS}
        negative = [name for name, value in given.items() if value < 0]
        if negative:
            raise TrainingError(
                f"the weight of the {negative[0]} loss is {given[negative[0]]}; it must not be negative"
            )
        if not any(given.values()):
            raise TrainingError(f"every loss has weight zero; give one of {', '.join(_TERMS)} a weight")

    @property
    def by_layer(self) -> bool:
        """Whether a term goes by layers or blocks, which needs the original as the teacher."""
        return self.weights > 0 or self.outputs > 0 or self.blocks > 0

    @property
    def taught(self) -> bool:
        """Whether a term needs a pass of the teacher."""
        return self.logits > 0 or self.outputs > 0 or self.blocks > 0


class Distillation:
    """The terms for a student and its teacher, which is run in evaluation mode and gets no gradients.

    `examples` are batches that the blocks are found on, where their outputs count.
    """

    def __init__(
        self,
        losses: Losses,
        student: nn.Module,
        teacher: nn.Module | None,
        plan: Plan | None,
        examples: Sequence[Inputs] = (),
    ) -> None:
        if losses.taught and teacher is None:
            raise TrainingError("losses of logits and outputs need a teacher; give one, or set their weights to zero")
        if losses.by_layer and (teacher is None or plan is None):
            raise TrainingError("losses by layer or block need the original as the teacher, and the plan of its layers")
        if losses.by_layer and teacher is not None and plan is not None:
            teacher = opened_original(teacher, plan)
        self.losses, self.student, self.teacher = losses, student, teacher
        compared = plan.decomposed if plan and (losses.weights or losses.outputs) else ()
        self.layers = tuple(one for one in compared if not one.narrowed)
        self.blocks: Mapping[str, BlockTarget] = {}
        if losses.blocks and teacher is not None and plan is not None:
            self.blocks = block_targets(teacher, student, plan, examples)
        if (losses.weights or losses.outputs) and plan and plan.changed and not self.layers:
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
            count, named = examples_in(x), (layer.name for layer in self.layers)
            distances = {name: self._distance(own[name], theirs[name], count) for name in named}
            terms["outputs"] = losses.outputs * self._over_layers(lambda layer: distances[layer.name])
        if losses.blocks:
            lost = [one.distance(own[name], theirs[name], examples_in(x)) for name, one in self.blocks.items()]
            terms["blocks"] = losses.blocks * torch.stack(lost).mean()
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
        """What the blocks and the decomposed layers, or those they stand for, give in a pass."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def note(module: nn.Module, args: Any, output: Any) -> None:
                seen[name] = cast(Tensor, first_tensor(output)).clone()  # a ReLU may overwrite it

            return note

        layers = {layer.name for layer in self.layers} if self.losses.outputs else set()
        with attached(
            model.get_submodule(name).register_forward_hook(keep(name)) for name in sorted(layers | self.blocks.keys())
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
