"""Fitting in forward order: every layer to the original's outputs, from the inputs the compressed network gives it.

Once the layers before it are compressed, a layer's inputs are x̃ instead of x. What it should give is still W x, so the
weight to approximate is no longer W but the best linear map from x̃ to W x (the asymmetric reconstruction of Zhang et
al., arXiv 1505.06798): T minimises E‖W x − T x̃‖², and with C = E[W x x̃ᵀ], S = E[x̃ x̃ᵀ]

    E‖W x − Ŵ x̃‖² = E‖(T − Ŵ) x̃‖² + constant,   T = (C + λ W) (S + λ)⁻¹.

So it is a fit of T in the metric S. The ridge λ leaves directions that the inputs hardly have as they are in W; it is
chosen so that what one half of the examples says is least wrong on the other. Where the mean of the outputs can be set
afterwards, by a bias or a batch norm, all moments are those about the mean, and it is. A batch norm gets the change
that compression made to the mean and variance of its inputs, not statistics measured anew: so nothing is lost where
calibration inputs differ from those of training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from rankfold.calibration.moments import LARGEST_MOMENT, MomentSum, forward_batch, patches_of
from rankfold.decompositions import Factors, metric_error, reconstruct, wiring_of
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.decompositions.refine import refine
from rankfold.decompositions.wiring import LayerShape, Wiring
from rankfold.network.hooks import attached
from rankfold.network.kinds import known_kind, shape_of, stage_factors, weight_of, weights_of_stages
from rankfold.network.layouts import write_factors_
from rankfold.network.passes import Inputs
from rankfold.network.tracing import followed
from rankfold.plan import LayerPlan, Plan
from rankfold.progress import Progress, silent

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e3)
"""λ as a share of the mean square of the inputs: the one that two-fold cross-validation over examples prefers."""
LARGEST_CHANGE = 16.0
"""Most by which the variance that a batch norm holds is multiplied or divided."""


@dataclass(frozen=True)
class _Place:
    """A decomposed layer: how often a pass calls it, and the batch norm, by name, that takes all it gives."""

    layer: LayerPlan
    calls: int
    norm: str | None

    @property
    def paths(self) -> tuple[str, ...]:
        """All names of the layer."""
        return (self.layer.name, *self.layer.aliases)


def refit_(
    student: nn.Module,
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Inputs],
    *,
    moments: Mapping[str, Moment] | None = None,
    progress: Progress = silent,
) -> Plan:
    """Fits the student's factors in forward order, in place, and returns the plan with the errors they now have.

    `student` is the model as `apply_plan` compressed it, `batches` what is iterated over once per layer. Biases and
    batch norms that follow a layer get the mean and variance its outputs lost; those of a layer that is called more
    than once in a pass stay. `moments` are the metric of the plan's errors. Raises DataError for batches that do not
    fit the model.
    """
    errors = {}
    places = _in_order(model, plan, batches)
    for done, place in enumerate(places):
        progress("fitting in forward order", done, len(places))
        halves = _collected(student, model, place, batches)
        module, stages = (one.get_submodule(place.layer.name) for one in (model, student))
        wiring = wiring_of(cast(str, place.layer.decomposition), shape_of(module))
        found = _fitted(module, stages, wiring, place, halves)
        weight, moment = weight_of(module).double(), (moments or {}).get(place.layer.name, IDENTITY)
        errors[place.layer.name] = metric_error(weight, wiring, found, moment)
        if place.calls == 1:
            _recentre_(student, model, place, halves[0] + halves[1], reconstruct(wiring, found))
    progress("fitting in forward order", len(places), len(places))
    return plan.with_layers(tuple(replace(one, error=errors.get(one.name, one.error)) for one in plan.layers))


class _Pairs:
    """Running sums over pairs of what the original's layer gives and what the student's is given, in float64."""

    def __init__(self, layer: LayerShape) -> None:
        self.inputs = MomentSum(layer)
        columns = layer.params // (layer.groups * layer.outputs)
        self.cross = torch.zeros(layer.groups, layer.outputs, columns, dtype=torch.float64)
        self.input_sum = torch.zeros(layer.groups, columns, dtype=torch.float64)
        self.output_sum = torch.zeros(layer.groups, layer.outputs, dtype=torch.float64)
        self.output_squares = torch.zeros_like(self.output_sum)

    def add(self, rows: Tensor, patches: Tensor) -> None:
        """Adds outputs (g, positions, o) and the patches (g, positions, n) in their place."""
        self.inputs.add(patches)
        self.input_sum += patches.sum(1, dtype=torch.float64).cpu()
        self.cross += (rows.mT @ patches).double().cpu()
        self.output_sum += rows.sum(1, dtype=torch.float64).cpu()
        self.output_squares += rows.double().square().sum(1).cpu()

    def __add__(self, other: _Pairs) -> _Pairs:
        """The sums over the pairs of both."""
        total = copy.copy(self)
        for name in ("inputs", "cross", "input_sum", "output_sum", "output_squares"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    @property
    def input_mean(self) -> Float64[Tensor, "g n"]:
        """E[x̃]."""
        return self.input_sum / max(self.inputs.positions, 1)

    @property
    def output_mean(self) -> Float64[Tensor, "g o"]:
        """E[W x], the layer's bias included."""
        return self.output_sum / max(self.inputs.positions, 1)

    @property
    def output_variance(self) -> Float64[Tensor, "g o"]:
        """Var[W x]."""
        return (self.output_squares / max(self.inputs.positions, 1) - self.output_mean.square()).clamp_min(0)

    def moments(self, centred: bool, bias: Tensor | None) -> tuple[Float64[Tensor, "g n n"], Float64[Tensor, "g o n"]]:
        """S and C of the module's head, about the means or, without the layer's bias, about zero."""
        square, cross = cast(Tensor, self.inputs.moment().joint), self.cross / max(self.inputs.positions, 1)
        if centred:
            mean = self.input_mean
            return square - _outer(mean, mean), cross - _outer(self.output_mean, mean)
        if bias is not None:
            cross = cross - _outer(bias.detach().double().cpu().reshape(len(cross), -1), self.input_mean)
        return square, cross


def _is_refitted(module: nn.Module) -> bool:
    kind, shape = known_kind(module), shape_of(module)
    wide = kind.axes == 0 and shape.inputs > LARGEST_MOMENT
    return not (kind.lookup or kind.stacked or wide)


class _Reached(BaseException):
    """Ends a pass behind the layer that it was made for; not an Exception, so that no model catches it."""


def _in_order(model: nn.Module, plan: Plan, batches: Iterable[Inputs]) -> list[_Place]:
    """The decomposed layers that are called, in the order of their first call.

    Embeddings have no inputs to be fitted to, and experts may see others than the original's do: both stay as they are,
    as do matrices too wide for their moment to be kept whole.
    """
    owners = {model.get_submodule(path): layer for layer in plan.decomposed for path in (layer.name, *layer.aliases)}
    apart = {layer for module, layer in owners.items() if not _is_refitted(module)}
    owners = {module: layer for module, layer in owners.items() if layer not in apart}
    order, followers = followed(model, owners, lambda: forward_batch(model, next(iter(batches)), 0))
    calls: dict[LayerPlan, int] = {}
    for module in order:
        calls[owners[module]] = calls.get(owners[module], 0) + 1
    norms = {owners[module]: norm for module, norm in followers.items()}
    return [_Place(layer, count, norms.get(layer)) for layer, count in calls.items()]


def _collected(student: nn.Module, model: nn.Module, place: _Place, batches: Iterable[Inputs]) -> tuple[_Pairs, _Pairs]:
    """The sums of a place over two halves of the examples."""
    module = model.get_submodule(place.layer.name)
    halves = _Pairs(shape_of(module)), _Pairs(shape_of(module))
    for number, batch in enumerate(batches):
        given = _seen(model, place, batch, number)
        for (_, output), (x, _) in zip(given, _seen(student, place, batch, number), strict=True):
            rows, start = _rows(module, output), 0
            for part in patches_of(module, x):
                middle, end = start + (part.shape[1] + number % 2) // 2, start + part.shape[1]
                patches = part.to(rows.dtype)
                halves[0].add(rows[:, start:middle], patches[:, : middle - start])
                halves[1].add(rows[:, middle:end], patches[:, middle - start :])
                start = end
    return halves


def _seen(model: nn.Module, place: _Place, batch: Inputs, number: int) -> list[tuple[Tensor, Tensor]]:
    """What goes into the layer and comes out of it in a pass, call by call; a pass of one call ends there."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if place.calls == 1:
            seen.append((x, output))
            raise _Reached
        seen.append((x.clone(), output.clone()))  # what follows may write into them

    modules = dict.fromkeys(model.get_submodule(path) for path in place.paths)
    with suppress(_Reached), attached(module.register_forward_hook(see, with_kwargs=True) for module in modules):
        forward_batch(model, batch, number)
    return seen


def _fitted(
    module: nn.Module, stages: nn.Module, wiring: Wiring, place: _Place, halves: tuple[_Pairs, _Pairs]
) -> Factors:
    """The factors fitted to the sums and written into the stages; as they are stored there, in float64."""
    weight, bias, pairs = weight_of(module).double().cpu(), cast("Tensor | None", module.bias), halves[0] + halves[1]
    start = tuple(one.detach().double().cpu() for one in stage_factors(stages, module, wiring, place.layer.ranks))
    if pairs.inputs.joint is not None and bool(pairs.inputs.joint.any()):
        centred = place.calls == 1 and (bias is not None or place.norm is not None)
        seen = all(half.inputs.positions > 1 for half in halves)
        ridge = _best_ridge(weight, *(half.moments(centred, bias) for half in halves)) if seen else RIDGES[-1]
        square, cross = pairs.moments(centred, bias)
        target = _regressed(weight, square, cross, [ridge])[0]
        fitted = refine(target, wiring, start, Moment(joint=square, positions=pairs.inputs.positions).shrunk())
        write_factors_(weights_of_stages(stages), shape_of(module), wiring, fitted)
    stored = stage_factors(stages, module, wiring, place.layer.ranks)
    return tuple(one.detach().to(weight_of(module).double()) for one in stored)


def _best_ridge(weight: Tensor, *halves: tuple[Tensor, Tensor]) -> float:
    """The ridge with which what is fitted to one half of the examples is least wrong on the other."""
    errors = torch.zeros(len(RIDGES), dtype=torch.float64)
    for (square, cross), (other, crossed) in (halves, halves[::-1]):
        for k, target in enumerate(_regressed(weight, square, cross, RIDGES)):
            matrix = target.flatten(2)
            errors[k] += ((matrix @ other - 2 * crossed) * matrix).sum()
    return RIDGES[int(errors.argmin())]


def _regressed(
    weight: Float64[Tensor, "g o i *taps"],
    square: Float64[Tensor, "g n n"],
    cross: Float64[Tensor, "g o n"],
    ridges: Sequence[float],
) -> list[Float64[Tensor, "g o i *taps"]]:
    """T of the module's head for each ridge, a share of the mean square of the inputs."""
    values, vectors = torch.linalg.eigh(square)
    mean = values.mean(-1).clamp_min(1e-300)[:, None, None]
    cross, flat = cross @ vectors, weight.flatten(2) @ vectors
    values = values.clamp_min(0)[:, None]
    found = ((cross + share * mean * flat) / (values + share * mean) for share in ridges)
    return [(one @ vectors.mT).reshape(weight.shape) for one in found]


def _recentre_(student: nn.Module, model: nn.Module, place: _Place, pairs: _Pairs, weight: Tensor) -> None:
    """Gives the mean that the outputs lost to the layer's bias or batch norm, and the variance to the batch norm."""
    weight = weight.cpu()
    last = list(student.get_submodule(place.layer.name).children())[-1]
    bias = cast("nn.Parameter | None", last.bias)
    mean = (weight.flatten(2) @ pairs.input_mean[..., None])[..., 0]
    lost = (pairs.output_mean - mean).flatten()
    if bias is not None:
        bias.data.copy_(lost)
    if place.norm is None:
        return
    norm, original = (cast(nn.BatchNorm2d, one.get_submodule(place.norm)) for one in (student, model))
    held_mean, held_variance = cast(Tensor, original.running_mean), cast(Tensor, original.running_var)
    if bias is None:
        cast(Tensor, norm.running_mean).copy_(held_mean - lost.to(held_mean))
    squares = (pairs.inputs.moment().applied(weight) * weight).flatten(2).sum(-1)
    variance = (squares - mean.square()).clamp_min(0)
    change = (variance / pairs.output_variance.clamp_min(1e-300)).clamp(1 / LARGEST_CHANGE, LARGEST_CHANGE)
    change = torch.where((variance > 0) & (pairs.output_variance > 0), change, 1.0).flatten()
    cast(Tensor, norm.running_var).copy_(held_variance * change.to(held_variance))


def _rows(module: nn.Module, output: Tensor) -> Float[Tensor, "g positions o"]:
    """A layer's output as one row per position, group by group, in the order of its patches; float32 at least."""
    output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    axes, groups = known_kind(module).axes, shape_of(module).groups
    if axes == 0:
        return output.reshape(1, -1, output.shape[-1])
    batched = output if output.ndim == axes + 2 else output[None]
    return batched.unflatten(1, (groups, -1)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[..., :, None] * right[..., None, :]
