"""Objectives that go through the whole network: all layers' weights at once, so that their interactions count.

The blended weights stand in for the layers' own in one functional call; the network itself is never changed.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from rankfold.errors import DataError, ModelError
from rankfold.network.kinds import module_weight
from rankfold.network.passes import (
    Inputs,
    describe_inputs,
    evaluating,
    examples_in,
    few,
    output_of,
    run,
    run_with,
    split,
    tensors_in,
)
from rankfold.search.curves import Curve
from rankfold.search.objective import Objective

ENOUGH = 2**11
"""Rows by which outputs of texts are compared, about, where every token has one."""
IN_PART = 2**20
"""Logits that are compared at once, about: what is in between takes several times their room."""


class NetworkObjective(Objective):
    """A mean over batches of a loss of the network's outputs.

    `batches` is any iterable; it is read once and kept. With `together=False` an evaluation takes one batch, the next
    each time; otherwise all of them.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], *, together: bool) -> None:
        self.model = model
        self.batches = list(batches)
        self.together = together
        if not self.batches:
            raise DataError("the objective has no batches; give at least one")

    def placed_on(self, model: nn.Module) -> NetworkObjective:
        """The same objective of another copy of its network."""
        if model is self.model:
            return self
        placed = copy.copy(self)
        placed.model = model
        return placed

    @abstractmethod
    def batch_loss(self, batch: int, call: Callable[[Inputs], Any]) -> Tensor:
        """The loss of a batch, by number; `call` runs the network with the blended weights."""

    @final
    def gradient(
        self, curves: Sequence[Curve], weights: Sequence[Tensor], iteration: int
    ) -> tuple[float, tuple[Tensor, ...]]:
        blended = [weight.detach().requires_grad_() for weight in weights]
        call, chosen = self._call(curves, blended), self._chosen(iteration)
        total, slopes = 0.0, [torch.zeros_like(weight) for weight in blended]
        with evaluating(self.model), torch.enable_grad():
            for batch in chosen:
                loss = self.batch_loss(batch, call) / len(chosen)
                found = torch.autograd.grad(loss, blended, retain_graph=batch != chosen[-1], allow_unused=True)
                total += float(loss.detach())
                slopes = [slope if new is None else slope + new for slope, new in zip(slopes, found, strict=True)]
        return total, tuple(slopes)

    @final
    def loss(self, curves: Sequence[Curve], weights: Sequence[Tensor], iteration: int) -> float:
        call, chosen = self._call(curves, weights), self._chosen(iteration)
        with evaluating(self.model), torch.no_grad():
            return sum(float(self.batch_loss(batch, call) / len(chosen)) for batch in chosen)

    def _chosen(self, iteration: int) -> Sequence[int]:
        """The batches of an evaluation, by number."""
        return range(len(self.batches)) if self.together else [iteration % len(self.batches)]

    def _call(self, curves: Sequence[Curve], weights: Sequence[Tensor]) -> Callable[[Inputs], Any]:
        """The network with other weights, as a function."""
        named = {
            f"{curve.layer.name}.weight".lstrip("."): module_weight(curve.layer, weight)
            for curve, weight in zip(curves, weights, strict=True)
        }
        return partial(run_with, self.model, named)

    def _amount(self) -> str:
        """How much data there is, in words, with a sum that tells one set of batches from another."""
        sizes = [describe_inputs(batch) for batch in self.batches]
        check = sum(float(tensor.double().abs().sum()) for batch in self.batches for tensor in tensors_in(batch))
        return f"{len(self.batches)} batches, first {sizes[0]}, sum {check:.10g}, {'all' if self.together else 'one'}"


class Divergence(NetworkObjective):
    """How far the outputs are from the teacher's, the network's own, on unlabelled batches.

    Outputs that are logits are compared by the Kullback-Leibler divergence of their softmax at `temperature`, over the
    axis of the classes (`class_axis`); with `logits=False` by the squared error relative to the teacher's size. A batch
    is a tensor, a tuple of positional or a dict of keyword arguments. The teacher runs once per batch.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Inputs],
        *,
        temperature: float = 1.0,
        logits: bool = True,
        together: bool = True,
    ) -> None:
        super().__init__(model, batches, together=together)
        self.temperature = temperature
        self.logits = logits
        self._taught: dict[int, Tensor] = {}

    def batch_loss(self, batch: int, call: Callable[[Inputs], Any]) -> Tensor:
        inputs = self.batches[batch]
        if batch not in self._taught:
            taught = output_of(run(self.model, inputs))
            if self.logits and taught.shape[class_axis(taught)] < 2:
                raise DataError(
                    f"the network's outputs {tuple(taught.shape)} have one column, where a softmax is always one and "
                    "the divergence zero; compare them by Divergence(..., logits=False)"
                )
            self._taught[batch] = taught
        taught, output = self._taught[batch], output_of(call(inputs))
        if not self.logits:
            return (output - taught).square().sum() / taught.square().sum().clamp_min(1e-30)
        return softened(output, taught, self.temperature)

    def describe(self) -> str:
        kind = f"Kullback-Leibler at temperature {self.temperature:g}" if self.logits else "squared error"
        return f"divergence from the teacher ({kind}; {self._amount()})"


class Validation(NetworkObjective):
    """A loss on labelled batches: pairs of inputs and targets, cross-entropy unless another `loss` is given."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Inputs, Any]],
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        together: bool = True,
    ) -> None:
        super().__init__(model, batches, together=together)
        self.criterion = loss

    def batch_loss(self, batch: int, call: Callable[[Inputs], Any]) -> Tensor:
        inputs, targets = self.batches[batch]
        output = call(inputs)
        loss = (
            self.criterion(output, targets) if self.criterion else functional.cross_entropy(output_of(output), targets)
        )
        if loss.ndim:
            raise DataError(f"the validation loss must be one number; it has shape {tuple(loss.shape)}")
        return loss

    def describe(self) -> str:
        name = getattr(self.criterion, "__qualname__", "the user's") if self.criterion else "cross-entropy"
        return f"validation loss ({name}; {self._amount()})"


def class_axis(output: Tensor) -> int:
    """The axis of an output that its classes are along: the second of dense predictions (n, classes, h, w…)."""
    return 1 if output.ndim > 3 else -1


def divergences(
    model: nn.Module, student: nn.Module, batches: Iterable[Inputs], temperature: float
) -> Float[Tensor, " rows"]:
    """How far a student's outputs are from the original's on some batches, row by row.

    Of outputs over classes the Kullback-Leibler divergence of their softmax at `temperature`, of others the squared
    error of an example, relative to the mean energy of the original's. Of texts the first `ENOUGH` tokens, in whole
    examples, are enough. Raises ModelError where the two cannot be compared.
    """
    errors, energies = [], []
    for batch in _in_parts(model, list(batches)):
        original = torch.atleast_1d(output_of(run(model, batch)))
        errors.append(_errors(run(student, batch), original, temperature))
        energies.append(_energies(original))
        if original.ndim == 3 and sum(map(len, errors)) >= ENOUGH:
            break
    return (torch.cat(errors) / torch.cat(energies).mean().clamp_min(1e-30)).double().cpu()


def _in_parts(model: nn.Module, batches: Sequence[Inputs]) -> list[Inputs]:
    """Batches as they are, or in parts for which the model gives `IN_PART` numbers at most, or one example's."""
    first = few(batches, 1)
    given = sum(output_of(run(model, one)).numel() / examples_in(one) for one in first)
    return split(batches, max(1, int(IN_PART / max(given, 1))))


def _errors(output: Any, original: Tensor, temperature: float) -> Float[Tensor, " rows"]:
    """Divergences of a student's outputs from the original's, or squared errors where they are no distributions."""
    own = torch.atleast_1d(output_of(output))
    if own.shape != original.shape:
        raise ModelError(f"the student gives outputs of shape {tuple(own.shape)}, the original {tuple(original.shape)}")
    if not over_classes(original):
        return (own - original).float().square().reshape(len(original), -1).sum(1)
    return _divergence(own, original, temperature)


def _energies(original: Tensor) -> Float[Tensor, " rows"]:
    """What the errors of `_errors` are relative to, on average: of divergences one, else an example's energy."""
    if over_classes(original):
        return torch.ones(original.numel() // original.shape[class_axis(original)], device=original.device)
    return original.float().square().reshape(len(original), -1).sum(1)


def over_classes(output: Tensor) -> bool:
    """Whether an output may be a distribution over classes: rows with more than one column."""
    return output.ndim > 1 and output.shape[class_axis(output)] > 1


def rows_of(output: Tensor, axis: int) -> tuple[Float[Tensor, "rows classes"], ...]:
    """Outputs with their classes last, in parts of about `IN_PART` logits."""
    rows = output.movedim(axis, -1).flatten(0, -2)
    return rows.split(max(1, IN_PART // rows.shape[-1]))


def softened(output: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T² times the Kullback-Leibler divergence of the softmax at T from the teacher's, over the classes, per row.

    Raises ModelError where the two do not have the same shape.
    """
    if output.shape != taught.shape:
        raise ModelError(
            f"the student gives outputs of shape {tuple(output.shape)}, the teacher {tuple(taught.shape)}; "
            "distillation needs a teacher of the same classes"
        )
    return _divergence(output, taught, temperature).mean()


def _divergence(output: Tensor, taught: Tensor, temperature: float) -> Float[Tensor, " rows"]:
    """T² times the Kullback-Leibler divergence of the softmax at T from the teacher's, row by row."""
    axis, found = class_axis(taught), []
    for part in zip(rows_of(output, axis), rows_of(taught, axis), strict=True):
        own, other = (functional.log_softmax(one.float() / temperature, -1) for one in part)
        found.append(functional.kl_div(own, other, reduction="none", log_target=True).sum(-1))
    return temperature**2 * torch.cat(found)
