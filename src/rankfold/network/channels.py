"""Channels: the hidden activations that may lose channels, found by running the network and not by names.

Every operator that a pass calls is watched. A layer's output carries its channels along one axis; operators that work
channel by channel hand them on, others (a softmax, a norm over channels, a product of activations, an operator that is
not known) read them, and then they have to stay. So do those that are added to others (residual streams), those that
leave the network, and those of layers that must not be touched. What is left is a set of channels with the layers that
make them and those that read them. That the sets are right is tried by putting their channels in another order, which
must not change what the network gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankfold.budget import Cost
from rankfold.network.costs import unfused
from rankfold.network.hooks import attached
from rankfold.network.kinds import known_kind, kind_of, shape_of
from rankfold.network.operators import BINARY, ELEMENTWISE, POOLS, is_entrywise, moved, reduced, reshaped
from rankfold.network.passes import Inputs, run, tensors_in
from rankfold.plan import ChannelSet, LayerSpec, Port


@dataclass(frozen=True)
class Channels:
    """The sets of channels of a network that may be narrowed, and for other hidden ones, by layer, why they may not."""

    found: tuple[ChannelSet, ...]
    kept: Mapping[str, str]


@dataclass(frozen=True)
class Tag:
    """Where a tensor carries channels: those from `start` on of a layer's, along an axis, `inner` entries each."""

    source: tuple[str, int, int]
    axis: int
    inner: int = 1


def find_channels(
    model: nn.Module, inputs: Inputs, layers: Sequence[LayerSpec], skipped: Mapping[str, str]
) -> Channels:
    """The channel sets between the `layers` of a network; `skipped` names what must not be touched, and why."""
    watch = _Watch(model, {layer.name: layer for layer in layers}, skipped)
    with unfused(), watch, attached(watch.hooks()):
        output = run(model, inputs)
    for tensor in tensors_in(output):
        watch.block(tensor, "the network gives it out")
    return watch.channels()


def is_depthwise(module: nn.Module) -> bool:
    """Whether a layer maps every channel to itself."""
    kind = kind_of(module)
    if kind is None or not kind.axes or kind.stacked:
        return False
    shape = shape_of(module)
    return shape.groups > 1 and shape.outputs == shape.inputs == 1


@dataclass
class _Set:
    """A set in the making."""

    sources: set[tuple[str, int, int]]
    consumers: dict[Port, None] = field(default_factory=dict)
    between: dict[str, None] = field(default_factory=dict)
    reason: str = ""


class _Watch(TorchDispatchMode):
    """Follows channels through a pass."""

    def __init__(self, model: nn.Module, layers: Mapping[str, LayerSpec], skipped: Mapping[str, str]) -> None:
        super().__init__()
        self.model, self.layers, self.skipped = model, layers, skipped
        self.modules = dict(model.named_modules())
        self.names = {module: name for name, module in self.modules.items()}
        self.owned = {id(one): name for name, one in (*model.named_parameters(), *model.named_buffers())}
        self.tags: dict[int, tuple[Tensor, Tag]] = {}
        self.sets: dict[tuple[str, int, int], _Set] = {}
        self.divided: dict[tuple[str, int, int], list[tuple[str, int, int]]] = {}
        self.inside = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see `costs`

    def hooks(self) -> Iterable[Any]:
        """Hooks on everything that makes channels, reads them, or works on them with parameters of its own."""
        for module, name in self.names.items():
            kind = kind_of(module)
            if kind is not None and not kind.lookup and not kind.stacked:
                enter, leave = (self._through(name)) if is_depthwise(module) else (self._read(name), self._made(name))
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) or (
                isinstance(module, nn.PReLU) and module.num_parameters > 1
            ):
                enter, leave = self._through(name)
            else:
                continue
            yield module.register_forward_pre_hook(enter, with_kwargs=True)
            yield module.register_forward_hook(leave, with_kwargs=True, always_call=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.inside:
            self._follow(str(func._overloadpacket), func.name(), args, kwargs or {}, out)
        return out

    def tag_of(self, tensor: object) -> Tag | None:
        """The tag of a tensor, if it carries channels."""
        known = self.tags.get(id(tensor))
        return known[1] if known is not None and known[0] is tensor else None

    def block(self, tensor: Tensor, reason: str) -> None:
        """Keeps the channels that a tensor carries as they are."""
        tag = self.tag_of(tensor)
        if tag is not None:
            self._block(tag.source, reason)

    def channels(self) -> Channels:
        """What was found once the pass is over."""
        for source, parts in self.divided.items():
            pieces = {id(self.sets[part]) for part in parts}
            if len(pieces) > 1 or self.sets[source].reason:
                for part in parts:
                    self._block(part, self.sets[source].reason or "its parts are used apart")
        found, kept = [], {}
        for one in {id(one): one for one in self.sets.values()}.values():
            if not (one.sources - self.divided.keys()):
                continue
            made = self._finished(one)
            if isinstance(made, ChannelSet):
                found.append(made)
            else:
                kept.update(dict.fromkeys(sorted({source[0] for source in one.sources}), made))
        return Channels(tuple(found), kept)

    def _finished(self, one: _Set) -> ChannelSet | str:
        """A set of channels that may be narrowed, or why it may not."""
        producers = sorted(one.sources - self.divided.keys())
        if one.reason:
            return one.reason
        if not one.consumers:
            return "no layer reads it"
        sizes = {stop - start for _, start, stop in producers}
        names = [name for name, _, _ in producers] + [port.layer for port in one.consumers]
        for name in dict.fromkeys([*names, *one.between]):
            reason = self._unfit(name)
            if reason:
                return f"{name}: {reason}"
        parts = 1
        modules = [self.model.get_submodule(name) for name in dict.fromkeys(names)]
        for groups in {shape_of(module).groups for module in modules}:
            if max(parts, groups) % min(parts, groups):
                return f"its layers have {parts} and {groups} groups"
            parts = max(parts, groups)
        size = sizes.pop()
        if size % parts or size // parts < 2:
            return f"it has {size} channels in {parts} groups"
        if parts > 1 and any(source in pieces for source in producers for pieces in self.divided.values()):
            return "parts of a grouped layer's outputs are used apart"
        consumers = tuple(one.consumers)
        return ChannelSet(
            consumers[0].layer,
            size,
            tuple(Port(name, start) for name, start, _ in producers),
            consumers,
            tuple(one.between),
            parts,
            self._cost_between(one.between, producers),
        )

    def _unfit(self, name: str) -> str:
        """Why a layer, module or parameter must keep its channels."""
        for inner, reason in self.skipped.items():
            if inner == name:
                return reason
        if name in self.layers:
            return "its weight is shared with other layers" if self.layers[name].aliases else ""
        module = self.modules.get(name)
        if module is not None and kind_of(module) is not None:
            return "it is not one of the layers that may change"
        return ""

    def _cost_between(self, between: Iterable[str], producers: Iterable[tuple[str, int, int]]) -> Cost:
        """Parameters and bytes of what works channel by channel, weights of layers left out, and of producers' biases."""
        modules = self.modules
        tensors: list[Tensor] = []
        buffers: list[Tensor] = []
        for name in between:
            if name not in modules:
                tensors.append(self.model.get_parameter(name))
                continue
            tensors += [one for one in modules[name].parameters() if one.ndim == 1]
            buffers += [one for one in modules[name].buffers() if one.ndim == 1]
        for name, start, stop in producers:
            bias = getattr(modules[name], "bias", None)
            tensors += [] if bias is None else [bias[start:stop]]
        size = sum(one.numel() * one.element_size() for one in (*tensors, *buffers))
        return Cost(sum(one.numel() for one in tensors), 0, size)

    def _read(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inside += 1
            x = args[0] if args else next(iter(kwargs.values()))
            tag = self.tag_of(x)
            if tag is None:
                return
            axes = known_kind(module).axes
            inputs = shape_of(module).inputs * shape_of(module).groups
            if tag.axis != x.ndim - 1 - axes or x.shape[tag.axis] != inputs or (axes and tag.inner > 1):
                self._block(tag.source, f"{name} does not read it along its channels")
            else:
                self._set(tag.source).consumers[Port(name, inner=tag.inner)] = None

        return enter

    def _made(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.inside -= 1
            if isinstance(output, Tensor):
                shape = shape_of(module)
                source = (name, 0, shape.outputs * shape.groups)
                self.sets.setdefault(source, _Set({source}))
                self._tag(output, Tag(source, output.ndim - 1 - known_kind(module).axes))

        return leave

    def _through(self, name: str) -> tuple[Any, Any]:
        carried: list[Tag | None] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inside += 1
            x = args[0] if args else next(iter(kwargs.values()))
            tag = self.tag_of(x)
            axis = x.ndim - 1 - known_kind(module).axes if kind_of(module) is not None else min(1, x.ndim - 1)
            if tag is not None and (tag.axis != axis or tag.inner > 1):
                self._block(tag.source, f"{name} does not work along its channels")
                tag = None
            carried.append(tag)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.inside -= 1
            tag = carried.pop() if carried else None
            if tag is not None and isinstance(output, Tensor):
                self._set(tag.source).between[name] = None
                self._tag(output, tag)

        return enter, leave

    def _follow(self, op: str, full: str, args: Any, kwargs: Any, out: Any) -> None:
        """What an operator does with the channels of its inputs."""
        given = [one for one in tensors_in([*args, *kwargs.values()]) if self.tag_of(one) is not None]
        if not given or op in _TELL_NOTHING:
            return
        first, tag = given[0], cast(Tag, self.tag_of(given[0]))
        result = out if isinstance(out, Tensor) else next(iter(tensors_in(out)), None)
        if op in BINARY:
            self._combine(op, args, out)
        elif op in ELEMENTWISE and result is not None and is_entrywise(args, result):
            self._tag(result, tag)
        elif op in POOLS and result is not None and tag.axis == first.ndim - 1 - POOLS[op]:
            self._tag(result, tag)
        elif op in ("aten.split", "aten.split_with_sizes", "aten.chunk") and self._divide(args, tag, out):
            pass
        elif op == "aten.slice" and self._slice(args, tag, out):
            pass
        else:
            placed = moved(op, args, tag.axis, tag.inner, out)
            placed = placed or reduced(op, args, kwargs, tag.axis, tag.inner)
            placed = placed or reshaped(op, first, tag.axis, tag.inner, out)
            if placed is None or len({self._root(cast(Tag, self.tag_of(one)).source) for one in given}) > 1:
                for one in given:
                    self.block(one, f"{full.split('.')[0].replace('aten::', '')} reads it")
            else:
                self._tag(cast(Tensor, out), Tag(tag.source, *placed))

    def _combine(self, op: str, args: Any, out: Tensor) -> None:
        """An operator on two tensors entry by entry: both carry the same channels, or one of them acts on all alike."""
        ranks = out.ndim
        placed: list[tuple[Tag, int]] = []
        for one in args[:2]:
            tag = self.tag_of(one)
            if tag is not None:
                placed.append((tag, tag.axis + ranks - one.ndim))
        tag, axis = placed[0]
        if len(placed) == 2:
            other, place = placed[1]
            if place != axis or other.inner != tag.inner or _width(other) != _width(tag):
                self._block(tag.source, "it meets other channels")
                self._block(other.source, "it meets other channels")
            elif op in _SUMS and other.source != tag.source:
                reason = "it is added to another activation (a residual stream)"
                self._block(tag.source, reason)
                self._block(other.source, reason)
            else:
                self._join(tag.source, other.source)
        else:
            other = next((one for one in args[:2] if isinstance(one, Tensor) and self.tag_of(one) is None), None)
            if other is not None and other.ndim and axis - (ranks - other.ndim) >= 0:
                place = axis - (ranks - other.ndim)
                if other.shape[place] != 1:
                    name = self.owned.get(id(other))
                    if name is None or other.numel() != _width(tag) or tag.inner > 1:
                        self._block(tag.source, f"{op.removeprefix('aten.')} joins it with another activation")
                    else:
                        self._set(tag.source).between[name] = None
        self._tag(out, Tag(tag.source, axis, tag.inner))

    def _divide(self, args: Any, tag: Tag, out: Sequence[Tensor]) -> bool:
        """A split: along the channels of one layer's output into sets of their own, along others into the same."""
        dim = (args[2] if len(args) > 2 else 0) % args[0].ndim
        if dim != tag.axis:
            for one in out:
                self._tag(one, tag)
            return True
        name, start, _ = tag.source
        if tag.inner > 1 or len(self._set(tag.source).sources) > 1:
            return False
        for one in out:
            source = (name, start, start + one.shape[dim])
            self.sets.setdefault(source, _Set({source}))
            self.divided.setdefault(tag.source, []).append(source)
            self._tag(one, Tag(source, dim))
            start += one.shape[dim]
        return True

    def _slice(self, args: Any, tag: Tag, out: Tensor) -> bool:
        """A slice along another axis, or of everything."""
        dim = (args[1] if len(args) > 1 else 0) % args[0].ndim
        if dim == tag.axis and out.shape != args[0].shape:
            return False
        self._tag(out, tag)
        return True

    def _tag(self, tensor: Tensor, tag: Tag) -> None:
        self.tags[id(tensor)] = (tensor, tag)

    def _set(self, source: tuple[str, int, int]) -> _Set:
        return self.sets[source]

    def _root(self, source: tuple[str, int, int]) -> int:
        return id(self.sets[source])

    def _block(self, source: tuple[str, int, int], reason: str) -> None:
        one = self.sets[source]
        one.reason = one.reason or reason

    def _join(self, left: tuple[str, int, int], right: tuple[str, int, int]) -> None:
        """Two sets are one from now on."""
        one, other = self.sets[left], self.sets[right]
        if one is other:
            return
        one.sources |= other.sources
        one.consumers.update(other.consumers)
        one.between.update(other.between)
        one.reason = one.reason or other.reason
        for source in other.sources:
            self.sets[source] = one


def _width(tag: Tag) -> int:
    return tag.source[2] - tag.source[1]


_SUMS = ("aten.add", "aten.add_", "aten.sub", "aten.sub_")
_TELL_NOTHING = ("aten.empty_like", "aten.zeros_like", "aten.ones_like", "aten.new_empty", "aten.new_zeros")
