"""Calibration: what goes into every layer, measured as second moments over a few unlabelled inputs.

The error of a layer that matters is that of its output. Over the input patches x a layer sees, E‖(W − Ŵ) x‖² is
tr (W − Ŵ) Σ (W − Ŵ)ᵀ with Σ = E[x xᵀ], the second moment of the patches, so Σ is all that has to be kept of the data.
Patches are those the layer's own stride, padding and dilation cut out, per group; a transposed convolution's are those
of its input with the zeros in between that its stride stands for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.decompositions.metric import Moment
from rankfold.decompositions.wiring import LayerShape
from rankfold.errors import DataError
from rankfold.network.hooks import attached
from rankfold.network.kinds import known_kind, shape_of
from rankfold.network.passes import Inputs, arguments_of, describe_inputs, reason_of, run
from rankfold.plan import LayerSpec
from rankfold.progress import Progress, silent

LARGEST_MOMENT = 4608
"""Side of the largest moment kept whole (85 MB).

A larger one is the Kronecker product of two; without taps a few rows stand for all of it, sums of patches with random
signs, whose expected outer product is theirs (Johnson and Lindenstrauss; Woodruff, arXiv 1411.4357, section 2).
"""
LARGEST_DOUBLE = 2048
"""Side up to which a moment is in float64."""
LARGEST_SKETCH = 1024
"""Rows that are kept of the inputs of a Linear whose moment is larger than that, patches or sums of them."""
UNSEEN = 0.1
"""Share of the mean over experts that is added to the moment of each: one that saw no inputs has some metric then."""
ENOUGH = 2**15
"""Patches of a convolution that are looked at in any case, where there are so many: neighbours overlap."""
ENOUGH_ROWS = 2**17
"""Inputs of a Linear that are: no two tokens are alike."""
PER_ENTRY = 8
"""Patches that are looked at for each of their entries."""
_CHUNK = 2**24
"""Entries of the patches that are cut out at a time."""


@dataclass(frozen=True)
class Calibration:
    """Moments by layer name, why layers have none, how many batches of which source they are from, and why that one.

    `inputs` are the batches themselves, empty where they were used up by measuring; `samples` counts what is in them.
    `held` are others, on which what was made by the moments is judged.
    """

    moments: Mapping[str, Moment]
    missing: Mapping[str, str]
    batches: int
    source: str
    reason: str = "asked for"
    samples: int = 0
    inputs: Iterable[Inputs] = field(default=(), repr=False)
    held: Sequence[Inputs] = field(default=(), repr=False)


def calibrate(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    batches: Iterable[Any],
    *,
    source: str = "given inputs",
    reason: str = "asked for",
    shrink: bool = True,
    progress: Progress = silent,
) -> Calibration:
    """The second moments of the layers' patches over all batches, in one pass that keeps none of them.

    A batch is a tensor, a tuple or list of positional arguments, or a dict of keyword arguments; the model is run in
    evaluation mode, and left as it was. Where patches are few for their size, moments are mixed with the identity
    (`Moment.shrunk`) unless `shrink` is false. A layer that is never called is listed as missing. Raises DataError for
    batches that are empty, do not fit the model, or lead to values that are not finite.
    """
    sums: dict[str, MomentSum] = {}
    modules = {name: model.get_submodule(name) for layer in layers for name in (layer.name, *layer.aliases)}
    modules = {name: module for name, module in modules.items() if not known_kind(module).lookup}
    owners = {name: layer.name for layer in layers for name in (layer.name, *layer.aliases)}
    count = samples = 0
    with _watched(modules, owners, sums, count_of(batches)):
        for batch in batches:
            progress("calibrating", count, count + 1)
            forward_batch(model, batch, count)
            count += 1
            samples += _examples(batch)
    if count == 0:
        raise DataError("the calibration inputs are empty; give at least one batch")
    progress("calibrating", count, count)
    for name, total in sums.items():
        if not total.finite:
            raise DataError(f"{name}: its inputs during calibration are not finite; check the calibration inputs")
    raw = {layer.name: sums[layer.name].moment() for layer in layers if layer.name in sums}
    moments = {name: moment.shrunk() for name, moment in raw.items()} if shrink else raw
    multiplied = {owners[name] for name in modules}
    missing = {
        layer.name: "never called on the calibration inputs"
        if layer.name in multiplied
        else "it reads rows, and has no inputs"
        for layer in layers
        if layer.name not in sums
    }
    kept = () if isinstance(batches, Iterator) else batches
    return Calibration(moments, missing, count, source, reason, samples, kept)


def patches_of(module: nn.Module, x: Tensor, thinning: slice = slice(None)) -> Iterator[Tensor]:
    """The patches a layer multiplies by its weight for an input, (g, positions, inputs × taps), some at a time.

    With a `thinning` those alone at some rows of the output, or some positions of a Linear.
    """
    kind, shape = known_kind(module), shape_of(module)
    if kind.axes == 0:
        flat = x.reshape(-1, x.shape[-1])[thinning]
        yield from (part[None] for part in flat.split(max(1, _CHUNK // x.shape[-1])))
        return
    batched = x if x.ndim == kind.axes + 2 else x[None]
    prepared = _spread(module, batched) if kind.transposed else _padded(module, batched)
    per_example = prepared[0].numel() * max(1, shape.params // (shape.groups * shape.outputs * shape.inputs))
    for part in prepared.split(max(1, _CHUNK // max(per_example, 1))):
        yield _cut(module, part, thinning)


class MomentSum:
    """A running sum of outer products, in float64, or in float32 where they are large."""

    def __init__(self, layer: LayerShape) -> None:
        groups, inputs = layer.groups, layer.inputs
        taps = layer.params // (groups * layer.outputs * inputs)
        self.shape = (groups, inputs, taps)
        whole = inputs * taps <= LARGEST_MOMENT or layer.routed
        dtype = torch.float64 if inputs * taps <= LARGEST_DOUBLE else torch.float32
        self.joint = torch.zeros(groups, inputs * taps, inputs * taps, dtype=dtype) if whole else None
        self.rows: list[Tensor] | None = None if whole or taps > 1 else []
        split = not whole and taps > 1
        self.inputs = torch.zeros(groups, inputs, inputs, dtype=torch.float64) if split else None
        self.taps = torch.zeros(groups, taps, taps, dtype=torch.float64) if split else None
        self.sum = torch.zeros(groups, inputs * taps, dtype=torch.float64) if self.rows is None else None
        self.positions = 0
        self.routed = layer.routed

    def add(self, patches: Tensor, group: int | None = None) -> None:
        """Adds patches (g, positions, inputs × taps), or those (1, …) of one of the groups."""
        positions = patches.shape[1]
        patches = patches.float() if patches.dtype in (torch.float16, torch.bfloat16) else patches
        self.positions += positions
        places = slice(None) if group is None else slice(group, group + 1)
        if self.sum is not None:
            self.sum[places] += patches.sum(1).double().cpu()
        if self.joint is not None:
            self.joint[places] += (patches.mT @ patches).cpu()
            return
        if self.rows is not None:
            self.rows.append(patches.float().cpu())
            if sum(one.shape[1] for one in self.rows) > LARGEST_SKETCH:
                self.rows = [_sketched(torch.cat(self.rows, 1), self.positions)]
            return
        split = patches.reshape(len(patches), positions, *self.shape[1:])
        by_inputs, by_taps = split.movedim(3, 2).flatten(1, 2), split.flatten(1, 2)
        cast(Tensor, self.inputs).add_((by_inputs.mT @ by_inputs).double().cpu())
        cast(Tensor, self.taps).add_((by_taps.mT @ by_taps).double().cpu())

    def __add__(self, other: MomentSum) -> MomentSum:
        """The sum over the patches of both."""
        total = copy.copy(self)
        for name in ("joint", "sum", "inputs", "taps", "rows"):
            own = getattr(self, name)
            setattr(total, name, None if own is None else own + getattr(other, name))
        total.positions = self.positions + other.positions
        return total

    @property
    def finite(self) -> bool:
        """Whether everything that was added was finite."""
        kept = [tensor for tensor in (self.joint, self.inputs, self.taps, *(self.rows or ())) if tensor is not None]
        return all(bool(torch.isfinite(tensor).all()) for tensor in kept)

    def moment(self) -> Moment:
        """The mean outer product."""
        count = max(self.positions, 1)
        if self.joint is not None:
            joint = self.joint / count
            if self.routed:
                joint = joint + UNSEEN * joint.mean(0, keepdim=True)
            mean = None if self.routed else cast(Tensor, self.sum) / count
            return Moment(joint=joint, positions=self.positions, mean=mean)
        if self.rows is not None:
            return Moment(rows=torch.cat(self.rows, 1) / count**0.5, positions=self.positions)
        _, inputs, taps = self.shape
        by_inputs, by_taps = cast(Tensor, self.inputs) / (count * taps), cast(Tensor, self.taps) / (count * inputs)
        square = by_taps.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)[:, None, None]
        return Moment(inputs=by_inputs, taps=by_taps / square, positions=self.positions)


def _sketched(rows: Tensor, seed: int) -> Tensor:
    """Half of `LARGEST_SKETCH` sums of rows (g, k, n), each with random signs, scaled to the outer product's size."""
    count = LARGEST_SKETCH // 2
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (count, rows.shape[1]), generator=generator).to(rows) * 2 - 1
    return signs @ rows / count**0.5


@contextmanager
def _watched(
    modules: Mapping[str, nn.Module], owners: Mapping[str, str], sums: dict[str, MomentSum], batches: int
) -> Iterator[None]:
    """Hooks that add up the patches of every call, gone afterwards whatever happens."""

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if name not in sums:
                sums[name] = MomentSum(shape_of(module))
            group = int(args[1]) if known_kind(module).stacked else None
            calls[name] = calls.get(name, -1) + 1
            thinning = slice(None) if group is not None else thinning_of(module, output, calls[name], batches)
            for patches in patches_of(module, x.detach(), thinning):
                sums[name].add(patches, group)

        return add

    calls: dict[str, int] = {}
    seen: dict[nn.Module, str] = {module: owners[name] for name, module in modules.items()}
    with attached(module.register_forward_hook(hook(name), with_kwargs=True) for module, name in seen.items()):
        yield


def forward_batch(model: nn.Module, batch: Inputs, number: int) -> None:
    """Runs the model on a batch, for what hooks see; raises DataError where the batch does not fit it."""
    try:
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


def _padded(module: nn.Module, x: Tensor) -> Tensor:
    """A convolution's input with its padding around it."""
    amounts = list(cast(Any, module)._reversed_padding_repeated_twice)
    mode = cast(str, module.padding_mode)
    return functional.pad(x, amounts, mode="constant" if mode == "zeros" else mode)


def _spread(module: nn.Module, x: Tensor) -> Tensor:
    """A transposed convolution's input with zeros between its entries and around it, to be cut at stride one."""
    conv = cast(Any, module)
    amounts: list[int] = []
    for axis, (stride, padding, extra, dilation, size) in enumerate(
        zip(conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.kernel_size, strict=True)
    ):
        spread = x.new_zeros([*x.shape[: 2 + axis], (x.shape[2 + axis] - 1) * stride + 1, *x.shape[3 + axis :]])
        spread[(slice(None),) * (2 + axis) + (slice(None, None, stride),)] = x
        x = spread
        around = dilation * (size - 1) - padding
        amounts = [around, around + extra, *amounts]
    return functional.pad(x, amounts)


def thinning_of(module: nn.Module, output: Tensor, number: int, batches: int) -> slice:
    """Which rows of an output of a layer, or positions of a Linear's, are looked at in one of so many batches.

    As many as there is need for: some times as many as they have entries tell their moment. The first row is another
    one in every batch.
    """
    axes, shape = known_kind(module).axes, shape_of(module)
    columns = shape.params // max(shape.groups * shape.outputs, 1)
    positions = output[..., 0].numel() if axes == 0 else output.numel() // output.shape[output.ndim - 1 - axes]
    rows = positions if axes == 0 else output.shape[-axes]
    enough = max(ENOUGH if axes else ENOUGH_ROWS, PER_ENTRY * columns)
    step = min(positions * batches // enough, rows)
    return slice(number % step, None, step) if step > 1 else slice(None)


def count_of(batches: Iterable[Any]) -> int:
    """How many batches there are, where it is known; else one."""
    return len(batches) if isinstance(batches, Sized) else 1


def _cut(module: nn.Module, x: Tensor, thinning: slice) -> Tensor:
    """The patches of a padded input, (g, positions, inputs × taps)."""
    kind, conv, groups = known_kind(module), cast(Any, module), shape_of(module).groups
    for axis in range(kind.axes):
        size, dilation = conv.kernel_size[axis], conv.dilation[axis]
        stride = 1 if kind.transposed else conv.stride[axis]
        taps = torch.arange(size, device=x.device) * dilation
        taps = taps.flip(0) if kind.transposed else taps
        count = (x.shape[2 + axis] - dilation * (size - 1) - 1) // stride + 1
        chosen = torch.arange(count, device=x.device)[thinning if axis == 0 else slice(None)]
        places = chosen[:, None] * stride + taps
        x = x.index_select(2 + axis, places.flatten()).unflatten(2 + axis, (len(chosen), size)).movedim(3 + axis, -1)
    batch, channels = x.shape[:2]
    x = x.reshape(batch, groups, channels // groups, -1, *conv.kernel_size).movedim(3, 1)  # b, positions, g, i, taps
    return x.movedim(2, 0).flatten(1, 2).flatten(2)
