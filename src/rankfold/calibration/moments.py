"""Calibration: what goes into every layer, measured as second moments over a few unlabelled inputs.

The error of a layer that matters is that of its output. Over the input patches x a layer sees, E‖(W − Ŵ) x‖² is
tr (W − Ŵ) Σ (W − Ŵ)ᵀ with Σ = E[x xᵀ], the second moment of the patches, so Σ is all that has to be kept of the data.
Patches are those the layer's own stride, padding and dilation cut out, per group; a transposed convolution's are those
of its input with the zeros in between that its stride stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.calibration.patches import thinning_of
from rankfold.calibration.positions import Importance, importance, weighted_patches
from rankfold.calibration.store import Changed, Stored
from rankfold.calibration.sums import PRODUCT, SKETCH, MomentSum
from rankfold.decompositions.metric import Moment
from rankfold.errors import DataError, reason_of
from rankfold.memory import share
from rankfold.network.hooks import Reached, attached, first_given
from rankfold.network.kinds import known_kind, shape_of
from rankfold.network.passes import Inputs, arguments_of, describe_inputs, device_of, few, run
from rankfold.network.precision import in_bfloat16
from rankfold.plan import LayerSpec
from rankfold.progress import Progress, silent
from rankfold.sharing import everywhere, owned, place

SHARE, SUMS = 0.25, 0.5
"""Part of the memory that moments may take before they are kept in files, and their sums before they are measured in
parts."""


@dataclass(frozen=True)
class Calibration:
    """Moments by layer name, why layers have none, how many batches of which source they are from, and why that one.

    `approximate` says of moments that are not kept whole what stands for them.

    `inputs` are the batches themselves, empty where they were used up by measuring; `samples` counts what is in them.
    `held` are others, on which what was made by the moments is judged. `weights` are those of the places of layers'
    outputs, where they count unequally; `outputs` are the metrics of layers' outputs that the moments hold. `narrow`
    says that passes were in bfloat16.
    """

    moments: Mapping[str, Moment]
    missing: Mapping[str, str]
    batches: int
    source: str
    reason: str = "asked for"
    samples: int = 0
    inputs: Iterable[Inputs] = field(default=(), repr=False)
    held: Sequence[Inputs] = field(default=(), repr=False)
    approximate: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    narrow: bool = False


def calibrate(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    batches: Iterable[Any],
    *,
    source: str = "given inputs",
    reason: str = "asked for",
    shrink: bool = True,
    narrow: bool = False,
    progress: Progress = silent,
) -> Calibration:
    """The second moments of the layers' patches over all batches, in passes that keep none of them.

    A batch is a tensor, a tuple or list of positional arguments, or a dict of keyword arguments; the model is run in
    evaluation mode, and left as it was. Where moments take more than a share of the memory there is (`rankfold.memory`)
    they are measured part by part and kept in files. Where patches are few for their size, moments are mixed with the
    identity (`Moment.shrunk`) unless `shrink` is false. Where a network's outputs hang on a few places of what a layer
    gives, such as a class token, these count more, and directions there have a metric
    (`rankfold.calibration.positions`). Passes, but not the sums, are in bfloat16 where they are to be `narrow`: fits of
    ResNet-50's layers by such moments have 0.01 to 0.2 % more of an error, by those of half of 200 images 1.3 to 360 %.
    A layer that is never called is listed as missing. Raises DataError for batches that are empty, do not fit the
    model, or lead to values that are not finite.
    """
    owners = {model.get_submodule(name): layer.name for layer in layers for name in (layer.name, *layer.aliases)}
    owners = {module: name for module, name in owners.items() if not known_kind(module).lookup}
    once = isinstance(batches, Iterator)
    matrices = [layer.name for layer in layers if known_kind(model.get_submodule(layer.name)).axes == 0]
    counts = Importance() if once else importance(model, matrices, batches)
    weights = counts.places
    parts, taken = _in_memory(owners, {}, once=once)
    if taken > share(SHARE) and not once:  # where there is room, nobody needs to know
        parts, taken = _in_memory(owners, _firsts(model, owners, weights, batches), once=once)
    moments: Stored | dict[str, Moment] = Stored() if taken > share(SHARE) else {}
    approximate: dict[str, str] = {}
    for number, part in enumerate(parts):
        what = f"calibrating, {number + 1} of {len(parts)}" if len(parts) > 1 else "calibrating"
        made, count, samples = _measured(
            model, part, batches, partial(progress, what), weights, shrink=shrink, narrow=narrow
        )
        for names, moment in made:
            moments.update(dict.fromkeys(names, moment))
            if moment.joint is None:
                approximate |= dict.fromkeys(names, SKETCH if moment.rows is not None else PRODUCT)
    missing = {
        layer.name: "never called on the calibration inputs"
        if layer.name in owners.values()
        else "it reads rows, and has no inputs"
        for layer in layers
        if layer.name not in moments
    }
    kept = () if once else batches
    known: Mapping[str, Moment] = moments
    if counts.outputs:
        known = Changed(moments, lambda name, one: replace(one, outputs=counts.outputs.get(name)))
    return Calibration(
        known, missing, count, source, reason, samples, kept, (), approximate, weights, counts.outputs, narrow
    )


def _in_memory(
    owners: Mapping[nn.Module, str], firsts: Mapping[str, str], *, once: bool
) -> tuple[list[dict[nn.Module, str]], int]:
    """The modules, with the layers that they are of, in parts whose sums fit into memory; all in one if asked for.

    Then the bytes of all sums. Layers have the sum of the one that is their first.
    """
    room, taken, sizes = share(SUMS), 0, dict[str, int]()
    parts: list[dict[nn.Module, str]] = [{}]
    for module, layer in owners.items():
        first = firsts.get(layer, layer)
        if first not in sizes:
            sizes[first] = MomentSum(shape_of(module), torch.device("meta")).nbytes
            taken += sizes[first]
            if taken > room and parts[-1] and not once:
                parts.append({})
                taken = sizes[first]
        parts[-1][module] = layer
    return parts, sum(sizes.values())


def _firsts(
    model: nn.Module, owners: Mapping[nn.Module, str], weights: Mapping[str, Tensor], batches: Iterable[Inputs]
) -> dict[str, str]:
    """For matrices that read the very same tensor in turn the first of them, as a pass over one example tells."""
    readers, firsts = _Readers(), dict[str, str]()

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        firsts.setdefault(owners[module], readers.first_of(owners[module], first_given(args, kwargs)))

    matrices = [module for module, name in owners.items() if _may_share(module, name, weights)]
    example = few(batches, 1)
    if example and len(matrices) > 1:
        with attached(one.register_forward_hook(see, with_kwargs=True) for one in matrices):
            forward_batch(model, example[0], 0)
    return firsts


def _may_share(module: nn.Module, name: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether a layer may have one sum with others: where it is a matrix, and all places count alike."""
    kind = known_kind(module)
    return kind.axes == 0 and not kind.stacked and name not in weights


class _Readers:
    """Tells of layers that read one tensor in turn, as query, key and value do."""

    def __init__(self) -> None:
        self._last: tuple[str, Tensor, int] | None = None

    def first_of(self, name: str, x: Tensor) -> str:
        """The layer that was the first to read a tensor that this one reads, without another in between."""
        if x.is_inference():  # it does not say whether it was written to
            return name
        version = x._version
        if self._last is None or self._last[1] is not x or self._last[2] != version:
            self._last = (name, x, version)
        return self._last[0]

    def passed(self) -> None:
        """Forgets the tensor, once the pass that it was in is over."""
        self._last = None


def _measured(
    model: nn.Module,
    owners: Mapping[nn.Module, str],
    batches: Iterable[Any],
    progress: Callable[[int, int], None],
    weights: Mapping[str, Tensor],
    *,
    shrink: bool,
    narrow: bool,
) -> tuple[Iterator[tuple[list[str], Moment]], int, int]:
    """Moments with the layers that they are of, over all batches; how many batches there were, and examples in them."""
    try:
        watch, count, samples = _watched(
            model, owners, batches, progress, weights, shared=not isinstance(batches, Iterator), narrow=narrow
        )
    except _Apart:
        watch, count, samples = _watched(model, owners, batches, progress, weights, shared=False, narrow=narrow)
    if count == 0:
        raise DataError("the calibration inputs are empty; give at least one batch")
    progress(count, count)
    return watch.moments(shrink=shrink), count, samples


def _watched(
    model: nn.Module,
    owners: Mapping[nn.Module, str],
    batches: Iterable[Any],
    progress: Callable[[int, int], None],
    weights: Mapping[str, Tensor],
    *,
    shared: bool,
    narrow: bool,
) -> tuple[_Watch, int, int]:
    """What went into some modules over all batches; how many batches there were, and examples in them."""
    watch, count, samples = _Watch(owners, count_of(batches), weights, shared=shared), 0, 0
    with watch.hooked():
        for batch in batches:
            progress(count, max(count_of(batches), count + 1))
            with suppress(Reached):
                forward_batch(model, batch, count, narrow=narrow)
            watch.passed()
            count += 1
            samples += _examples(batch)
    return watch, count, samples


class _Apart(BaseException):
    """Layers that shared a sum have read different inputs; not an Exception, so that no model catches it."""


class _Watch:
    """Adds up the patches of every call of some modules, which are parts of layers, by the layers' names.

    Of several processes each does so for some layers. Layers that read the very same tensor, as query, key and value
    do, have one sum if they are `shared` and all places count alike; where that is not so in all passes, _Apart is
    raised. Where every layer is called once in every pass, a pass ends at the last of them: a language model's head is
    costly.
    """

    def __init__(
        self, owners: Mapping[nn.Module, str], batches: int, weights: Mapping[str, Tensor], *, shared: bool
    ) -> None:
        self.owners, self.batches, self.weights, self.shared = owners, batches, weights, shared
        self.sums: dict[str, MomentSum] = {}
        self.own: dict[str, bool] = {}
        self.firsts: dict[str, str] = {}
        self._calls: dict[str, int] = {}
        self._readers = _Readers()
        self._passes, self._once = 0, False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on all modules, gone afterwards whatever happens."""
        with attached(one.register_forward_hook(self._see, with_kwargs=True) for one in self.owners):
            yield

    def passed(self) -> None:
        """What there is to do after every pass."""
        self._passes += 1
        self._once = set(self._calls.values()) == {self._passes} and len(self._calls) == len(self.owners)
        self._readers.passed()
        if any(self._calls[name] != self._calls[first] for name, first in self.firsts.items()):
            raise _Apart

    def moments(self, *, shrink: bool) -> Iterator[tuple[list[str], Moment]]:
        """The moment of every sum, with the layers that it is of; the sums go as they are read."""
        for number, first in enumerate(list(self.sums)):
            total = self.sums.pop(first)
            total = everywhere(total if owned(number) else None, total.device)[number % place()[1]]
            if not total.finite:
                raise DataError(f"{first}: its inputs during calibration are not finite; check the calibration inputs")
            moment = total.moment()
            yield [name for name, other in self.firsts.items() if other == first], moment.shrunk() if shrink else moment

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        name, kind, x = self.owners[module], known_kind(module), first_given(args, kwargs)
        number = self._calls.get(name, 0)
        self._calls[name] = number + 1
        shares = self.shared and _may_share(module, name, self.weights)
        first = self._readers.first_of(name, x) if shares else name
        if self.firsts.setdefault(name, first) != first:
            raise _Apart
        if first == name:
            if name not in self.sums:
                self.sums[name] = MomentSum(shape_of(module), x.device)
                self.own[name] = owned(len(self.own))
            group = int(args[1]) if kind.stacked else None
            thinning = slice(None) if group is not None else thinning_of(module, output, number, self.batches)
            if self.own[name]:
                with in_bfloat16(x.device, enabled=False):
                    for patches, weights in weighted_patches(module, x.detach(), thinning, self.weights.get(name)):
                        self.sums[name].add(patches, group, weights)
        if self._once and set(self._calls.values()) == {number + 1}:
            raise Reached


def forward_batch(model: nn.Module, batch: Inputs, number: int, *, narrow: bool = False) -> None:
    """Runs the model on a batch, for what hooks see, in bfloat16 if it is to be `narrow`.

    Raises DataError where the batch does not fit the model.
    """
    try:
        with in_bfloat16(device_of(model), enabled=narrow):
            run(model, batch)
    except Exception as error:
        raise DataError(
            f"calibration batch {number}, {describe_inputs(batch)}, does not fit the model: {reason_of(error)}"
        ) from error


def _examples(batch: Inputs) -> int:
    """How many examples a batch holds, by its first tensor."""
    args, kwargs = arguments_of(batch)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    return len(tensors[0]) if tensors else 1


def count_of(batches: Iterable[Any]) -> int:
    """How many batches there are, where it is known; else one."""
    return len(batches) if isinstance(batches, Sized) else 1
