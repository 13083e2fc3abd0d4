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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from rankfold.calibration.moments import LARGEST_MOMENT, MomentSum, count_of, forward_batch, patches_of, thinning_of
from rankfold.calibration.walks import Walk, walking
from rankfold.decompositions import wiring_of
from rankfold.decompositions.interpolative import by_group
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.decompositions.refine import refine
from rankfold.decompositions.wiring import LayerShape
from rankfold.network.copies import sharing
from rankfold.network.hooks import attached
from rankfold.network.kinds import known_kind, shape_of, stage_factors, weight_of, weights_of_stages
from rankfold.network.layouts import write_factors_
from rankfold.network.narrowing import composed_weight, narrow_, narrowed_error, rows_of, write_weight_
from rankfold.network.passes import Inputs, evaluating, tensors_in
from rankfold.network.tracing import followed
from rankfold.plan import LayerPlan, Plan
from rankfold.progress import Progress, silent

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e3)
"""λ as a share of the mean square of the inputs: the one that two-fold cross-validation over examples prefers."""
SHARE = 0.5
"""Part of the free memory that passes may hold while they wait."""
LARGEST_SHARE = 2**31
"""Bytes that they may hold at most."""
HELD = 2
"""How many times as much a pass holds, about, as the largest of the calls that it waits between takes and gives."""
LARGEST_CHANGE = 16.0
"""Most by which the variance that a batch norm holds is multiplied or divided."""


@dataclass(frozen=True)
class _Place:
    """A changed layer: how often a pass calls it, and the batch norm, by name, that takes all it gives.

    `batches` is how many passes may wait there in memory.
    """

    layer: LayerPlan
    calls: int
    norm: str | None
    batches: int

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
    skeleton = narrow_(sharing(model), plan.narrowings) if plan.narrowings else model
    pair = _Networks(model, student, skeleton, plan)
    with evaluating(model), evaluating(student), _passes(pair, batches) as passes:
        for done, place in enumerate(passes.places):
            progress("fitting in forward order", done, len(passes.places))
            halves = _collected(pair, place, passes.seen(place), passes.active(place))
            found = _fitted(pair, place, halves)
            if place.calls == 1:
                _recentre_(pair, place, halves[0] + halves[1], found)
            layer, moment = place.layer, (moments or {}).get(place.layer.name, IDENTITY)
            if layer.narrowed:
                errors[layer.name] = narrowed_error(model, student, plan, layer, moment)
            else:
                weight = weight_of(model.get_submodule(layer.name)).double()
                errors[layer.name] = float(moment.energy(weight - found) / moment.energy(weight).clamp_min(1e-300))
        progress("fitting in forward order", len(passes.places), len(passes.places))
    return plan.with_layers(tuple(replace(one, error=errors.get(one.name, one.error)) for one in plan.layers))


@dataclass(frozen=True)
class _Networks:
    """The original, the student, and the original as narrow as the student: its layers say how theirs are called."""

    model: nn.Module
    student: nn.Module
    skeleton: nn.Module
    plan: Plan

    def rows(self, place: _Place, output: Tensor, thinning: slice) -> Float[Tensor, "g positions o"]:
        """What a layer of the original gave, one row per position, of the outputs that the student has."""
        module = self.model.get_submodule(place.layer.name)
        rows = _rows(module, output, thinning)
        if not place.layer.narrowed:
            return rows
        shape = shape_of(module)
        kept = rows_of(self.plan.narrowings, place.layer.name, shape.groups * shape.outputs)
        if shape.depthwise:
            return rows[kept]
        return torch.stack([rows[g][:, one] for g, one in enumerate(by_group(kept, shape.groups, shape.outputs))])


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
        self.input_sum += patches.sum(1).double().cpu()
        self.cross += (rows.mT @ patches).double().cpu()
        self.output_sum += rows.sum(1).double().cpu()
        self.output_squares += rows.square().sum(1).double().cpu()

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


class _Passes:
    """The passes of two networks over the same batches, from which a layer's outputs and inputs are taken in order.

    A batch is run once, its passes waiting at every layer: at layers of large inputs and outputs only as many batches
    as memory allows, the others start later. For layers that are called more than once all are run from the start.
    """

    def __init__(self, pair: _Networks, batches: Iterable[Inputs], places: list[_Place]) -> None:
        self.pair, self.batches, self.places = pair, batches, places
        self.walks: list[tuple[Walk, Walk]] = []

    def active(self, place: _Place) -> int:
        """How many batches a layer is fitted to."""
        return min(place.batches, len(self.walks)) if place.calls == 1 else count_of(self.batches)

    def seen(self, place: _Place) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For every call of a layer the batch's number, what the original gives, and what goes into the student."""
        if place.calls == 1:
            number = self.places.index(place)
            for count, (original, student) in enumerate(self.walks[: self.active(place)]):
                output, x = original.to(number), student.to(number)
                if output is not None and x is not None:
                    yield count, output, x
            return
        for count, batch in enumerate(self.batches):
            given = _seen(self.pair.model, place, batch, count)
            for (_, output), (x, _) in zip(given, _seen(self.pair.student, place, batch, count), strict=True):
                yield count, output, x


@contextmanager
def _passes(pair: _Networks, batches: Iterable[Inputs]) -> Iterator[_Passes]:
    """The passes over the batches, none of them begun."""
    places = _in_order(pair.model, pair.plan, batches)
    passes = _Passes(pair, batches, places)
    stops = {place.layer.name: number for number, place in enumerate(places) if place.calls == 1}

    def walks(model: nn.Module, *, outputs: bool) -> Any:
        modules = {model.get_submodule(name): number for name, number in stops.items()}
        return walking(model, modules, lambda batch, k: forward_batch(model, batch, k), batches, outputs=outputs)

    with walks(pair.model, outputs=True) as original, walks(pair.student, outputs=False) as student:
        passes.walks = list(zip(original, student, strict=True))
        yield passes


class _Reached(BaseException):
    """Ends a pass behind the layer that it was made for; not an Exception, so that no model catches it."""


def _in_order(model: nn.Module, plan: Plan, batches: Iterable[Inputs]) -> list[_Place]:
    """The changed layers that are called, in the order of their first call.

    Embeddings have no inputs to be fitted to, and experts may see others than the original's do: both stay as they are,
    as do matrices too wide for their moment to be kept whole.
    """
    owners = {model.get_submodule(path): layer for layer in plan.changed for path in (layer.name, *layer.aliases)}
    apart = {layer for module, layer in owners.items() if not _is_refitted(module)}
    owners = {module: layer for module, layer in owners.items() if layer not in apart}
    held: dict[LayerPlan, int] = {}
    sizes = [0]

    def measure(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sizes.append(sum(one.numel() * one.element_size() for one in tensors_in([*args, output])))
        if module in owners:
            held[owners[module]] = max(held.get(owners[module], 0), *sizes)
            sizes[:] = [0]

    leaves = [module for module in model.modules() if module in owners or not any(True for _ in module.children())]
    with attached(module.register_forward_hook(measure) for module in leaves):
        order, followers = followed(model, owners, lambda: forward_batch(model, next(iter(batches)), 0))
    calls: dict[LayerPlan, int] = {}
    for module in order:
        calls[owners[module]] = calls.get(owners[module], 0) + 1
    norms = {owners[module]: norm for module, norm in followers.items()}
    memory, largest, allowed = min(free_memory() * SHARE, LARGEST_SHARE), 1, {}
    for layer in reversed(calls):
        largest = max(largest, 2 * HELD * held.get(layer, 0))
        allowed[layer] = max(1, int(memory / largest))
    return [_Place(layer, count, norms.get(layer), allowed[layer]) for layer, count in calls.items()]


def free_memory() -> int:
    """Bytes of memory that are free, where the system tells; else four gigabytes."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4 * 2**30


def _collected(
    pair: _Networks, place: _Place, seen: Iterable[tuple[int, Tensor, Tensor]], batches: int
) -> tuple[_Pairs, _Pairs]:
    """The sums of a place over two halves of the examples."""
    module, original = (one.get_submodule(place.layer.name) for one in (pair.skeleton, pair.model))
    halves = _Pairs(shape_of(module)), _Pairs(shape_of(module))
    for number, output, x in seen:
        thinning = thinning_of(original, output, number, batches)
        rows, start = pair.rows(place, output, thinning), 0
        for part in patches_of(module, x, thinning):
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


def _fitted(pair: _Networks, place: _Place, halves: tuple[_Pairs, _Pairs]) -> Float64[Tensor, "g o i *taps"]:
    """The weight that a layer has once it is fitted to the sums, or that its factors stand for, as it is stored."""
    layer, pairs = place.layer, halves[0] + halves[1]
    module, own = (one.get_submodule(layer.name) for one in (pair.skeleton, pair.student))
    bias = cast("Tensor | None", own.bias)
    weight = (composed_weight(own) if layer.narrowed else weight_of(module)).double().cpu()
    if pairs.inputs.joint is not None and bool(pairs.inputs.joint.any()):
        centred = place.calls == 1 and (bias is not None or place.norm is not None)
        seen = all(half.inputs.positions > 1 for half in halves)
        ridge = _best_ridge(weight, *(half.moments(centred, bias) for half in halves)) if seen else RIDGES[-1]
        square, cross = pairs.moments(centred, bias)
        target = _regressed(weight, square, cross, [ridge])[0]
        if layer.decomposition is None:
            write_weight_(own, target)
        else:
            wiring = wiring_of(layer.decomposition, shape_of(module))
            start = tuple(one.detach().double().cpu() for one in stage_factors(own, module, wiring, layer.ranks))
            fitted = refine(target, wiring, start, Moment(joint=square, positions=pairs.inputs.positions).shrunk())
            write_factors_(weights_of_stages(own), shape_of(module), wiring, fitted)
    return composed_weight(own).detach().to(weight_of(module).device).double()


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


def _recentre_(pair: _Networks, place: _Place, pairs: _Pairs, weight: Tensor) -> None:
    """Gives the mean that the outputs lost to the layer's bias or batch norm, and the variance to the batch norm."""
    weight, own = weight.cpu(), pair.student.get_submodule(place.layer.name)
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
    squares = (pairs.inputs.moment().applied(weight) * weight).flatten(2).sum(-1)
    variance = (squares - mean.square()).clamp_min(0)
    change = (variance / pairs.output_variance.clamp_min(1e-300)).clamp(1 / LARGEST_CHANGE, LARGEST_CHANGE)
    change = torch.where((variance > 0) & (pairs.output_variance > 0), change, 1.0).flatten()
    cast(Tensor, norm.running_var).copy_(held_variance * change.to(held_variance))


def _rows(module: nn.Module, output: Tensor, thinning: slice) -> Float[Tensor, "g positions o"]:
    """A layer's output as one row per position, group by group, in the order of its patches; float32 at least."""
    output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    axes, groups = known_kind(module).axes, shape_of(module).groups
    if axes == 0:
        return output.reshape(-1, output.shape[-1])[thinning][None]
    batched = (output if output.ndim == axes + 2 else output[None])[:, :, thinning]
    return batched.unflatten(1, (groups, -1)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[..., :, None] * right[..., None, :]
