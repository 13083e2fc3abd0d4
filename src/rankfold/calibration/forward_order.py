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

Where a layer's outputs are multiplied by a and added to a stream, which is s in the original and s̃ in the student,
W x + (s − s̃) / a takes the place of W x: it is the sum that comes out, and what earlier layers lost does not add up.
Matrices that join no stream are then not fitted once more: T x̃, the mean of W x given x̃, varies less than W x, and no
batch norm makes up for that (DeiT-Tiny at 70 % of its MACs: 49.3 % of top-1 with them and 53.5 without, where the
stream is not made up for 44.3).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from rankfold.calibration.in_step import Networks, Place, in_step
from rankfold.calibration.patches import thinning_of
from rankfold.calibration.positions import weighted_patches
from rankfold.calibration.sums import MomentSum
from rankfold.decompositions import energy_of, wiring_of
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.decompositions.refine import refine
from rankfold.decompositions.wiring import LayerShape
from rankfold.memory import trim
from rankfold.network.copies import sharing
from rankfold.network.kinds import shape_of, stage_factors, weight_of, weights_of_stages
from rankfold.network.layouts import write_factors_
from rankfold.network.narrowing import composed_weight, narrow_, narrowed_error, narrowed_moment, write_weight_
from rankfold.network.passes import Inputs, evaluating
from rankfold.plan import Plan
from rankfold.progress import Progress, silent

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e3)
"""λ as a share of the mean square of the inputs: the one that two-fold cross-validation over examples prefers."""
JUDGED = 64
"""Outputs, at least, by which it is chosen, where there are so many."""
LARGEST_EXACT = 1024
"""Side of a moment up to which regressions on it are solved in float64."""
LARGEST_CHANGE = 16.0
"""Most by which the variance that a batch norm holds is multiplied or divided."""


def refit_(
    student: nn.Module,
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Inputs],
    *,
    moments: Mapping[str, Moment] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    outputs: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
) -> Plan:
    """Fits the student's factors in forward order, in place, and returns the plan with the errors they now have.

    `student` is the model as `apply_plan` compressed it; `batches` are run once by both, layer by layer. Biases and
    batch norms that follow a layer get the mean and variance its outputs lost; those of a layer that is called more
    than once in a pass stay. `moments` are the metric of the plan's errors, `weights` those of the places of layers'
    outputs, and `outputs` their metrics (`rankfold.calibration.positions`). Raises DataError for batches that do not
    fit the model.
    """
    place_of_ridge = len(RIDGES) // 2
    skeleton = narrow_(sharing(model), plan.narrowings) if plan.narrowings else model
    pair = Networks(model, student, skeleton, plan)
    with evaluating(model), evaluating(student), in_step(pair, batches) as passes:
        for done, place in enumerate(passes.places):
            progress("fitting in forward order", done, len(passes.places))
            halves = _collected(pair, place, passes.seen(place), passes.active(place), weights or {})
            ridge = _ridge(pair, place, halves, place_of_ridge)
            place_of_ridge = place_of_ridge if ridge is None else ridge
            pairs = halves[0] + halves[1]
            del halves
            counted = Moment(outputs=(outputs or {}).get(place.layer.name))
            found = _fitted(pair, place, pairs, RIDGES[-1 if ridge is None else ridge], counted)
            if place.calls == 1:
                _recentre_(pair, place, pairs, found)
            del pairs
            trim()
        progress("fitting in forward order", len(passes.places), len(passes.places))
    corrected = sorted(place.layer.name for place in passes.places if place.join is not None)
    plan = replace(plan, settings={**plan.settings, **({"corrected_layers": corrected} if corrected else {})})
    changed = {place.layer.name for place in passes.places if place.layer in plan.changed}
    return with_errors(student, model, plan, changed, moments or {})


def with_errors(
    student: nn.Module, model: nn.Module, plan: Plan, changed: Set[str], moments: Mapping[str, Moment]
) -> Plan:
    """The plan with the errors that some of its layers have by now, in the metric of the moments."""
    layers = []
    for layer in plan.layers:
        moment = moments.get(layer.name, IDENTITY)
        if layer.name in changed and layer.narrowed:
            layer = replace(layer, error=narrowed_error(model, student, plan, layer, moment))
        elif layer.name in changed:
            weight = weight_of(model.get_submodule(layer.name)).double()
            lost = energy_of(weight - composed_weight(student.get_submodule(layer.name)).to(weight), moment)
            layer = replace(layer, error=lost / max(energy_of(weight, moment), 1e-300))
        layers.append(layer)
    return plan.with_layers(tuple(layers))


class _Pairs:
    """Running sums over pairs of what the original's layer gives and what the student's is given, in float64."""

    def __init__(self, layer: LayerShape, device: torch.device) -> None:
        self.inputs = MomentSum(layer, device)
        columns = layer.params // (layer.groups * layer.outputs)
        self.cross = torch.zeros(layer.groups, layer.outputs, columns, dtype=torch.float64, device=device)
        self.output_sum = self.cross.new_zeros(layer.groups, layer.outputs)
        self.output_squares = torch.zeros_like(self.output_sum)

    def add(self, rows: Tensor, patches: Tensor, weights: Tensor | None) -> None:
        """Adds outputs (g, positions, o) and the patches (g, positions, n) in their place, each with its weight."""
        self.inputs.add(patches, weights=weights)
        weighted = rows if weights is None else rows * weights[:, None]
        self.cross += (weighted.mT @ patches).double()
        self.output_sum += weighted.sum(1).double()
        self.output_squares += (weighted * rows).sum(1).double()

    def __add__(self, other: _Pairs) -> _Pairs:
        """The sums over the pairs of both."""
        total = copy.copy(self)
        for name in ("inputs", "cross", "output_sum", "output_squares"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    @property
    def input_mean(self) -> Float64[Tensor, "g n"]:
        """E[x̃]."""
        return cast(Tensor, self.inputs.sum) / self.inputs.count

    @property
    def output_mean(self) -> Float64[Tensor, "g o"]:
        """E[W x], the layer's bias included."""
        return self.output_sum / self.inputs.count

    @property
    def output_variance(self) -> Float64[Tensor, "g o"]:
        """Var[W x]."""
        return (self.output_squares / self.inputs.count - self.output_mean.square()).clamp_min(0)

    def moments(self, centred: bool, bias: Tensor | None) -> tuple[Float64[Tensor, "g n n"], Float64[Tensor, "g o n"]]:
        """S and C of the module's head, about the means or, without the layer's bias, about zero."""
        square, cross = cast(Tensor, self.inputs.moment().joint), self.cross / self.inputs.count
        if centred:
            mean = self.input_mean
            return square - _outer(mean, mean).to(square), cross - _outer(self.output_mean, mean)
        if bias is not None:
            cross = cross - _outer(bias.detach().double().reshape(len(cross), -1), self.input_mean)
        return square, cross


def _collected(
    pair: Networks,
    place: Place,
    seen: Iterable[tuple[int, Tensor, Tensor]],
    batches: int,
    weights: Mapping[str, Tensor],
) -> tuple[_Pairs, _Pairs]:
    """The sums of a place over two halves of the examples."""
    module, original = (one.get_submodule(place.layer.name) for one in (pair.skeleton, pair.model))
    shape, device = shape_of(module), weight_of(original).device
    halves = _Pairs(shape, device), _Pairs(shape, device)
    for number, output, x in seen:
        thinning = thinning_of(original, output, number, batches)
        rows, start = pair.rows(place, output, thinning), 0
        for part, counts in weighted_patches(module, x, thinning, weights.get(place.layer.name)):
            patches, given = part.to(rows.dtype), rows[:, start : start + part.shape[1]]
            middle = (part.shape[1] + number % 2) // 2
            for half, own in zip(halves, (slice(middle), slice(middle, None)), strict=True):
                half.add(given[:, own], patches[:, own], None if counts is None else counts[own])
            start += part.shape[1]
        trim()
    return halves


def _ridge(pair: Networks, place: Place, halves: tuple[_Pairs, _Pairs], tried: int) -> int | None:
    """The place of a layer's ridge, sought from the one `tried` first; None where a half has seen too little."""
    if not all(half.inputs.positions > 1 and half.inputs.joint is not None for half in halves):
        return None
    bias = cast("Tensor | None", pair.student.get_submodule(place.layer.name).bias)
    moments = []
    for half in halves:
        square, cross = half.moments(_about_means(place, bias), bias)
        moments.append((square.to(_dtype_of(square)), cross))
    return _best_ridge(_weight(pair, place), tried, *moments)


def _fitted(
    pair: Networks, place: Place, pairs: _Pairs, ridge: float, counted: Moment
) -> Float64[Tensor, "g o i *taps"]:
    """The weight that a layer has once it is fitted to the sums, or that its factors stand for, as it is stored.

    `counted` holds the metric of the original layer's outputs.
    """
    layer = place.layer
    module, own = (one.get_submodule(layer.name) for one in (pair.skeleton, pair.student))
    if pairs.inputs.joint is not None and bool(pairs.inputs.joint.any()):
        bias = cast("Tensor | None", own.bias)
        square, cross = pairs.moments(_about_means(place, bias), bias)
        target = _regressed(_weight(pair, place), square, cross, ridge)
        if layer.decomposition is None:
            write_weight_(own, target)
        else:
            wiring = wiring_of(layer.decomposition, shape_of(module))
            start = tuple(one.detach().double() for one in stage_factors(own, module, wiring, layer.ranks))
            kept = narrowed_moment(counted, pair.model, pair.plan, layer)
            moment = replace(kept, joint=square, positions=pairs.inputs.effective).shrunk()
            fitted = refine(target, wiring, start, moment)
            write_factors_(weights_of_stages(own), shape_of(module), wiring, fitted)
    return composed_weight(own).detach().double()


def _weight(pair: Networks, place: Place) -> Float64[Tensor, "g o i *taps"]:
    """The weight that a layer's regression changes: the original's, or where channels are gone what rebuilds them."""
    module, own = (one.get_submodule(place.layer.name) for one in (pair.skeleton, pair.student))
    return (composed_weight(own) if place.layer.narrowed else weight_of(module)).double()


def _about_means(place: Place, bias: Tensor | None) -> bool:
    """Whether moments are those about the mean: where a bias or a batch norm takes what the mean loses."""
    return place.calls == 1 and (bias is not None or place.norm is not None)


def _best_ridge(weight: Tensor, best: int, *halves: tuple[Tensor, Tensor]) -> int:
    """The place of the ridge with which what is fitted to one half of the examples is least wrong on the other.

    It is sought from a first guess of it on, towards where it gets better.
    """

    def error(place: int) -> float:
        if place not in known:
            known[place] = 0.0
            for (square, cross), (other, crossed) in (halves, halves[::-1]):
                matrix = _regressed(weight, square, cross, RIDGES[place]).flatten(2).to(other)
                known[place] += float(((matrix @ other - 2 * crossed) * matrix).sum())
        return known[place]

    step = max(1, weight.shape[1] // JUDGED)
    halves = tuple((square, cross[:, ::step].to(square)) for square, cross in halves)
    weight = weight[:, ::step]
    known: dict[int, float] = {}
    for step in (-1, 1):
        while 0 <= best + step < len(RIDGES) and error(best + step) < error(best):
            best += step
    return best


def _regressed(
    weight: Float64[Tensor, "g o i *taps"],
    square: Float64[Tensor, "g n n"],
    cross: Float64[Tensor, "g o n"],
    ridge: float,
) -> Float64[Tensor, "g o i *taps"]:
    """T of the module's head for a ridge, a share of the mean square of the inputs.

    It is found as a change of W, which takes but few digits, so that large systems are solved in float32.
    """
    mean = square.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    triangle = _triangle(square.to(_dtype_of(square)), ridge * torch.where(mean > 0, mean, 1.0))
    square, cross, flat = (one.to(triangle) for one in (square, cross, weight.flatten(2)))
    change = torch.cholesky_solve((cross - flat @ square).mT, triangle).mT
    return weight + change.double().reshape(weight.shape)


def _triangle(square: Float[Tensor, "g n n"], added: Float[Tensor, "g 1"]) -> Float[Tensor, "g n n"]:
    """The Cholesky factor of a moment with a ridge, in float64 where rounding in float32 has made it indefinite."""
    for dtype in dict.fromkeys((square.dtype, torch.float64)):
        triangle, failed = torch.linalg.cholesky_ex(_with_ridge(square, added, dtype))
        if not failed.any():
            return triangle
    return torch.linalg.cholesky(_with_ridge(_definite(square.double()), added, torch.float64))


def _with_ridge(
    square: Float[Tensor, "g n n"], added: Float[Tensor, "g 1"], dtype: torch.dtype
) -> Float[Tensor, "g n n"]:
    """A copy of a moment with something added on its diagonal."""
    ridged = square.to(dtype, copy=True)
    ridged.diagonal(dim1=-2, dim2=-1).add_(added.to(ridged))
    return ridged


def _dtype_of(square: Tensor) -> torch.dtype:
    """The dtype in which regressions on a moment are solved."""
    return torch.float32 if square.shape[-1] > LARGEST_EXACT else torch.float64


def _definite(square: Float[Tensor, "g n n"]) -> Float[Tensor, "g n n"]:
    """A moment without the negative eigenvalues that rounding has given it."""
    values, vectors = torch.linalg.eigh(square)
    return (vectors * values.clamp_min(0)[:, None]) @ vectors.mT


def _recentre_(pair: Networks, place: Place, pairs: _Pairs, weight: Tensor) -> None:
    """Gives the mean that the outputs lost to the layer's bias or batch norm, and the variance to the batch norm."""
    own = pair.student.get_submodule(place.layer.name)
    bias = cast("nn.Parameter | None", own.bias)
    mean = (weight.flatten(2) @ pairs.input_mean[..., None])[..., 0]
    lost = (pairs.output_mean - mean).flatten()
    if bias is not None:
        bias.data.copy_(lost)
    if place.norm is None:
        return
    norm, original = (cast(nn.BatchNorm2d, one.get_submodule(place.norm)) for one in (pair.student, pair.skeleton))
    held_mean, held_variance = cast(Tensor, original.running_mean), cast(Tensor, original.running_var)
    if bias is None:
        cast(Tensor, norm.running_mean).copy_(held_mean - lost.to(held_mean))
    if place.join is not None:
        return  # what counts is the sum with the stream
    squares = (pairs.inputs.moment().applied(weight) * weight).flatten(2).sum(-1)
    variance = (squares - mean.square()).clamp_min(0)
    change = (variance / pairs.output_variance.clamp_min(1e-300)).clamp(1 / LARGEST_CHANGE, LARGEST_CHANGE)
    change = torch.where((variance > 0) & (pairs.output_variance > 0), change, 1.0).flatten()
    cast(Tensor, norm.running_var).copy_(held_variance * change.to(held_variance))


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[..., :, None] * right[..., None, :]
