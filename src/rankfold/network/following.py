"""Following: what becomes of a layer's channels in a pass, operator by operator.

A layer's output carries its channels along one axis; operators that work channel by channel hand them on, and any other
reads them. What is not known (`network/operators.py`) is taken to read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankfold.network.hooks import first_given
from rankfold.network.kinds import kind_of, known_kind, shape_of
from rankfold.network.operators import BINARY, ELEMENTWISE, POOLS, is_entrywise, moved, reduced, reshaped
from rankfold.network.passes import tensors_in
from rankfold.plan import Port

Source = tuple[str, int, int]
"""A layer's outputs from one place to another."""


@dataclass(frozen=True)
class Tag:
    """Where a tensor carries channels: those from `start` on of a layer's, along an axis, `inner` entries each."""

    source: Source
    axis: int
    inner: int = 1


@dataclass
class Followed:
    """A set in the making."""

    sources: set[Source]
    consumers: dict[Port, None] = field(default_factory=dict)
    between: dict[str, None] = field(default_factory=dict)
    reason: str = ""


class Following(TorchDispatchMode):
    """Follows channels through a pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = dict(model.named_modules())
        self.names = {module: name for name, module in self.modules.items()}
        self.owned = {id(one): name for name, one in (*model.named_parameters(), *model.named_buffers())}
        self.tags: dict[int, tuple[Tensor, Tag]] = {}
        self.known: dict[Source, Followed] = {}
        self.divided: dict[Source, list[Source]] = {}
        self.inside = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see `costs`

    def hooks(self) -> Iterable[Any]:
        """Hooks on everything that makes channels, reads them, or works on them with parameters of its own."""
        for module, name in self.names.items():
            kind = kind_of(module)
            if kind is not None and not kind.lookup and not kind.stacked:
                enter, leave = self._through(name) if is_depthwise(module) else (self._read(name), self._made(name))
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

    def settle(self) -> None:
        """Once the pass is over: of a layer's outputs that were divided all parts have to be used alike."""
        for source, parts in self.divided.items():
            pieces = {id(self.known[part]) for part in parts}
            if len(pieces) > 1 or self.known[source].reason:
                for part in parts:
                    self._block(part, self.known[source].reason or "its parts are used apart")

    def sets(self) -> list[Followed]:
        """What was followed, each once, but for what was divided."""
        distinct = {id(one): one for one in self.known.values()}.values()
        return [one for one in distinct if one.sources - self.divided.keys()]

    def _read(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inside += 1
            x = first_given(args, kwargs)
            tag = self.tag_of(x)
            if tag is None:
                return
            axes = known_kind(module).axes
            inputs = shape_of(module).inputs * shape_of(module).groups
            if tag.axis != x.ndim - 1 - axes or x.shape[tag.axis] != inputs or (axes and tag.inner > 1):
                self._block(tag.source, f"{name} does not read it along its channels")
            else:
                self.known[tag.source].consumers[Port(name, inner=tag.inner)] = None

        return enter

    def _made(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.inside -= 1
            if isinstance(output, Tensor):
                shape = shape_of(module)
                source = (name, 0, shape.outputs * shape.groups)
                self.known.setdefault(source, Followed({source}))
                self._tag(output, Tag(source, output.ndim - 1 - known_kind(module).axes))

        return leave

    def _through(self, name: str) -> tuple[Any, Any]:
        carried: list[Tag | None] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inside += 1
            x = first_given(args, kwargs)
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
                self.known[tag.source].between[name] = None
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
        elif result is not None and self._acts_alike(op, args, first, tag, result):
            self._tag(result, tag)
        elif not (op in _SPLITS and self._divide(args, tag, out)):
            placed = moved(op, args, tag.axis, tag.inner, out)
            placed = placed or reduced(op, args, kwargs, tag.axis, tag.inner)
            placed = placed or reshaped(op, first, tag.axis, tag.inner, out)
            if placed is None or len({id(self.known[cast(Tag, self.tag_of(one)).source]) for one in given}) > 1:
                for one in given:
                    self.block(one, f"{full.split('.')[0].replace('aten::', '')} reads it")
            else:
                self._tag(cast(Tensor, out), Tag(tag.source, *placed))

    def _acts_alike(self, op: str, args: Any, first: Tensor, tag: Tag, result: Tensor) -> bool:
        """Whether an operator does the same to all channels and leaves them where they are."""
        if op == "aten.slice":
            dim = (args[1] if len(args) > 1 else 0) % first.ndim
            return dim != tag.axis or result.shape == first.shape
        if op in ELEMENTWISE:
            return is_entrywise(args, result)
        return op in POOLS and tag.axis == first.ndim - 1 - POOLS[op]

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
            plain = next((one for one in args[:2] if isinstance(one, Tensor) and self.tag_of(one) is None), None)
            if plain is not None and plain.ndim and axis - (ranks - plain.ndim) >= 0:
                place = axis - (ranks - plain.ndim)
                if plain.shape[place] != 1:
                    name = self.owned.get(id(plain))
                    if name is None or plain.numel() != _width(tag) or tag.inner > 1:
                        self._block(tag.source, f"{op.removeprefix('aten.')} joins it with another activation")
                    else:
                        self.known[tag.source].between[name] = None
        self._tag(out, Tag(tag.source, axis, tag.inner))

    def _divide(self, args: Any, tag: Tag, out: Sequence[Tensor]) -> bool:
        """A split: along the channels of one layer's output into sets of their own, along others into the same."""
        dim = (args[2] if len(args) > 2 else 0) % args[0].ndim
        if dim != tag.axis:
            for one in out:
                self._tag(one, tag)
            return True
        name, start, _ = tag.source
        if tag.inner > 1 or len(self.known[tag.source].sources) > 1:
            return False
        for one in out:
            source = (name, start, start + one.shape[dim])
            self.known.setdefault(source, Followed({source}))
            self.divided.setdefault(tag.source, []).append(source)
            self._tag(one, Tag(source, dim))
            start += one.shape[dim]
        return True

    def _tag(self, tensor: Tensor, tag: Tag) -> None:
        self.tags[id(tensor)] = (tensor, tag)

    def _block(self, source: Source, reason: str) -> None:
        one = self.known[source]
        one.reason = one.reason or reason

    def _join(self, left: Source, right: Source) -> None:
        """Two sets are one from now on."""
        one, other = self.known[left], self.known[right]
        if one is other:
            return
        one.sources |= other.sources
        one.consumers.update(other.consumers)
        one.between.update(other.between)
        one.reason = one.reason or other.reason
        for source in other.sources:
            self.known[source] = one


def is_depthwise(module: nn.Module) -> bool:
    """Whether a layer maps every channel to itself."""
    kind = kind_of(module)
    if kind is None or not kind.axes or kind.stacked:
        return False
    shape = shape_of(module)
    return shape.groups > 1 and shape.outputs == shape.inputs == 1


def _width(tag: Tag) -> int:
    return tag.source[2] - tag.source[1]


_SPLITS = ("aten.split", "aten.split_with_sizes", "aten.chunk")
_SUMS = ("aten.add", "aten.add_", "aten.sub", "aten.sub_")
_TELL_NOTHING = ("aten.empty_like", "aten.zeros_like", "aten.ones_like", "aten.new_empty", "aten.new_zeros")
