"""Fitting in forward order: every layer to the original's outputs, from the inputs the compressed network gives it.

Once the layers before it are compressed, a layer's inputs are x̃ instead of x. What it should give is still W x, so the
weight to approximate is no longer W but the best linear map from x̃ to W x (the asymmetric reconstruction of Zhang et
al., arXiv 1505.06798, section 2.4): T minimises E‖W x − T x̃‖², and with C = E[W x x̃ᵀ], S = E[x̃ x̃ᵀ]

    E‖W x − Ŵ x̃‖² = E‖(T − Ŵ) x̃‖² + constant,   T = (C + λ W) (S + λ)⁻¹.

So it is a fit of T in the metric S; the ridge λ leaves directions that the inputs hardly have as they are in W. Where
the mean of the outputs can be set afterwards, by a bias or a batch norm, all moments are those about the mean, and it
is. A batch norm gets the change that compression made to the mean and variance of its inputs, not statistics measured
anew: so nothing is lost where calibration inputs differ from those of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from rankfold.calibration import MomentSum, forward_batch, patches_of
from rankfold.decompositions import Factors, metric_error, reconstruct, wiring_of
from rankfold.decompositions.refine import refine
from rankfold.layers import (
    LAYER_KINDS,
    shape_of,
    stage_factors,
    stage_weights,
    weight_of,
    weights_of_stages,
)
from rankfold.metric import IDENTITY, Moment
from rankfold.network import Inputs, holds_statistics
from rankfold.plan import LayerPlan, Plan
from rankfold.progress import Progress, silent
from rankfold.wiring import LayerShape, Wiring

RIDGE = 1e-3
"""λ as a share of the mean square of the inputs."""
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
        pairs = _collected(student, model, place, batches)
        module, stages = (one.get_submodule(place.layer.name) for one in (model, student))
        wiring = wiring_of(cast(str, place.layer.decomposition), shape_of(module))
        found = _fitted(module, stages, wiring, place, pairs)
        weight, moment = weight_of(module).double(), (moments or {}).get(place.layer.name, IDENTITY)
        errors[place.layer.name] = metric_error(weight, wiring, found, moment)
        if place.calls == 1:
            _recentre_(student, model, place, pairs, reconstruct(wiring, found))
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

    def add(self, module: nn.Module, output: Tensor, x: Tensor) -> None:
        """Adds what the original's `module` gave, and what the student's was given in its place."""
        rows = _rows(module, output)
        self.output_sum += rows.sum(1, dtype=torch.float64).cpu()
        self.output_squares += rows.double().square().sum(1).cpu()
        start = 0
        for part in patches_of(module, x):
            patches = part.to(rows.dtype)
            self.inputs.add(patches)
            self.input_sum += patches.sum(1, dtype=torch.float64).cpu()
            self.cross += (rows[:, start : start + patches.shape[1]].mT @ patches).double().cpu()
            start += patches.shape[1]

    @property
    def input_mean(self) -> Float64[Tensor, "g n"]:
        """E[x̃]."""
        return self.input_sum / self.inputs.positions

    @property
    def output_mean(self) -> Float64[Tensor, "g o"]:
        """E[W x], the layer's bias included."""
        return self.output_sum / self.inputs.positions

    @property
    def output_variance(self) -> Float64[Tensor, "g o"]:
        """Var[W x]."""
        return (self.output_squares / self.inputs.positions - self.output_mean.square()).clamp_min(0)


class _Reached(BaseException):
    """Ends a pass behind the layer that it was made for; not an Exception, so that no model catches it."""


def _in_order(model: nn.Module, plan: Plan, batches: Iterable[Inputs]) -> list[_Place]:
    """The decomposed layers that are called, in the order of their first call."""
    owners = {model.get_submodule(path): layer for layer in plan.decomposed for path in (layer.name, *layer.aliases)}
    norms: dict[nn.Module, str] = {module: name for name, module in model.named_modules() if holds_statistics(module)}
    calls: dict[LayerPlan, int] = {}
    outputs: list[tuple[LayerPlan, Tensor]] = []
    takers: dict[str, list[LayerPlan | None]] = {}

    def called(module: nn.Module, args: Any, output: Tensor) -> None:
        calls[owners[module]] = calls.get(owners[module], 0) + 1
        outputs.append((owners[module], output))

    def taken(module: nn.Module, args: tuple[Any, ...]) -> None:
        giver = next((layer for layer, output in outputs if args and args[0] is output), None)
        takers.setdefault(norms[module], []).append(giver)

    handles = [module.register_forward_hook(called) for module in owners]
    handles += [module.register_forward_pre_hook(taken) for module in norms]
    try:
        forward_batch(model, next(iter(batches)), 0)
    finally:
        for handle in handles:
            handle.remove()
    followers = {givers[0]: name for name, givers in takers.items() if len(givers) == 1}
    return [_Place(layer, count, followers.get(layer)) for layer, count in calls.items()]


def _collected(student: nn.Module, model: nn.Module, place: _Place, batches: Iterable[Inputs]) -> _Pairs:
    """The sums of a place over all batches."""
    module = model.get_submodule(place.layer.name)
    pairs = _Pairs(shape_of(module))
    for number, batch in enumerate(batches):
        given = _seen(model, place, batch, number)
        for (_, output), (x, _) in zip(given, _seen(student, place, batch, number), strict=True):
            pairs.add(module, output, x)
    return pairs


def _seen(model: nn.Module, place: _Place, batch: Inputs, number: int) -> list[tuple[Tensor, Tensor]]:
    """What goes into the layer and comes out of it in a pass, call by call; a pass of one call ends there."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if place.calls == 1:
            seen.append((x, output))
            raise _Reached
        seen.append((x.clone(), output.clone()))  # what follows may write into them

    handles = [
        module.register_forward_hook(see, with_kwargs=True)
        for module in dict.fromkeys(model.get_submodule(path) for path in place.paths)
    ]
    try:
        forward_batch(model, batch, number)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _fitted(module: nn.Module, stages: nn.Module, wiring: Wiring, place: _Place, pairs: _Pairs) -> Factors:
    """The factors fitted to the sums and written into the stages; as they are stored there, in float64."""
    weight = weight_of(module).double()
    moment, bias = pairs.inputs.moment(), cast("Tensor | None", module.bias)
    start = tuple(one.detach().double().cpu() for one in stage_factors(stages, module, wiring, place.layer.ranks))
    if moment.joint is not None and float(moment.joint.diagonal(dim1=-2, dim2=-1).sum()) > 0:
        square, cross = moment.joint, pairs.cross / pairs.inputs.positions
        if place.calls == 1 and (bias is not None or place.norm):
            square = square - _outer(pairs.input_mean, pairs.input_mean)
            cross = cross - _outer(pairs.output_mean, pairs.input_mean)
        elif bias is not None:
            cross = cross - _outer(bias.detach().double().cpu().reshape(len(cross), -1), pairs.input_mean)
        target = _regressed(weight.cpu(), square, cross)
        fitted = refine(target, wiring, start, Moment(joint=square))
        with torch.no_grad():
            for held, new in zip(weights_of_stages(stages), stage_weights(module, wiring, fitted), strict=True):
                held.copy_(new)
    stored = stage_factors(stages, module, wiring, place.layer.ranks)
    return tuple(one.detach().to(weight) for one in stored)


def _regressed(
    weight: Float64[Tensor, "g o i *taps"], square: Float64[Tensor, "g n n"], cross: Float64[Tensor, "g o n"]
) -> Float64[Tensor, "g o i *taps"]:
    """T of the module's head, with its ridge."""
    ridge = RIDGE * square.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-300)
    held = square + ridge * torch.eye(square.shape[-1], dtype=square.dtype)
    found = torch.linalg.solve(held, (cross + ridge * weight.flatten(2)).mT).mT
    return found.reshape(weight.shape)


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
    axes, groups = LAYER_KINDS[type(module)].axes, shape_of(module).groups
    if axes == 0:
        return output.flatten(0, -2)[None]
    batched = output if output.ndim == axes + 2 else output[None]
    return batched.unflatten(1, (groups, -1)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[..., :, None] * right[..., None, :]
