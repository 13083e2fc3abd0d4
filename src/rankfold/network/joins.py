"""Joins: where what a layer gives is added to something that the network had before, as residual blocks do.

They are found by a pass, not by names: an addition joins a layer to a stream if one of its operands is what the layer
gave, scaled and shifted channel by channel at most (batch norm, layer scale, dropout), and the other went into a module
or came out of one before the layer was called.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from rankfold.network.hooks import attached, first_given
from rankfold.network.kinds import known_kind
from rankfold.network.tracing import Operands

RECENT = 3
"""Layers, those called last, whose outputs may be what is added."""
LEAST_PLACES = 3
"""Places of an output that have to agree on what becomes of each channel."""
LEAST_SCALE = 0.1
"""Part of the root mean square of all scales that a channel is taken to have: what it lacks is divided by its scale."""
TOLERANCE = 1e-6
"""Share of the energy of what is added, about its mean, that may be something else."""


@dataclass(frozen=True)
class Join:
    """What a layer's outputs are added to: what goes into a module, by name, or with `output` what it gives.

    `scale` is what every channel of the outputs is multiplied by before, by a batch norm or a layer scale. Channels are
    along an `axis` of the outputs, and another of the stream where axes are swapped on the way.
    """

    module: str
    output: bool
    scale: Float[Tensor, " o"]
    axis: int
    axis_of_stream: int

    def needed(self, stream: Tensor, own: Tensor) -> Tensor | float:
        """What a layer's outputs need besides, so that their sum with its `own` stream is what it is with another."""
        if stream.shape != own.shape:
            return 0.0
        size = self.scale.abs().clamp_min(LEAST_SCALE * float(self.scale.square().mean().sqrt()))
        scale = size.copysign(self.scale).to(own.dtype)
        return ((stream - own).movedim(self.axis_of_stream, -1) / scale).movedim(-1, self.axis)


def find_joins(model: nn.Module, layers: Iterable[nn.Module], forward: Callable[[], object]) -> dict[nn.Module, Join]:
    """The joins of some layers in a pass that `forward` runs, as far as they have one."""
    watch = _Watch(set(layers))
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(watch.entered(name), with_kwargs=True))
        hooks.append(module.register_forward_hook(watch.left(name)))
    with attached(hooks), Operands(added=watch.added):
        forward()
    return {layer: join for layer, join in watch.found.items() if watch.calls[layer] == 1}


class _Watch:
    """What modules take and give in a pass, and when."""

    def __init__(self, layers: set[nn.Module]) -> None:
        self.layers = layers
        self.calls: dict[nn.Module, int] = {}
        self.found: dict[nn.Module, Join] = {}
        self._time = 0
        self._begun: dict[nn.Module, int] = {}
        self._given: deque[tuple[nn.Module, Tensor]] = deque(maxlen=RECENT)
        self._known: dict[int, tuple[weakref.ref[Tensor], str, bool, int]] = {}

    def entered(self, name: str) -> Callable[..., None]:
        """A hook for what goes into a module."""

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if args or kwargs:
                self._note(first_given(args, kwargs), name, output=False)
            self._begun[module] = self._time

        return note

    def left(self, name: str) -> Callable[..., None]:
        """A hook for what a module gives."""

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._note(output, name, output=True)
            if module in self.layers:
                self.calls[module] = self.calls.get(module, 0) + 1
                self._given.append((module, output.clone()))

        return note

    def added(self, one: Tensor, other: Tensor) -> None:
        """Looks whether an addition is a join."""
        for term, stream in ((one, other), (other, one)):
            known, name, output, since = self._known.get(id(stream), (None, "", False, 0))
            if known is None or known() is not stream:
                continue
            for layer, given in reversed(self._given):
                if since < self._begun[layer] and (join := _joined(layer, given, term, name, output=output)):
                    self.found[layer] = join
                    return

    def _note(self, tensor: Any, name: str, *, output: bool) -> None:
        self._time += 1
        if isinstance(tensor, Tensor):
            known = self._known.get(id(tensor))
            if known is None or known[0]() is not tensor:
                self._known[id(tensor)] = (weakref.ref(tensor), name, output, self._time)


def _joined(layer: nn.Module, given: Tensor, term: Tensor, name: str, *, output: bool) -> Join | None:
    """The join of a layer whose outputs become a term of a sum, if they do so channel by channel."""
    axis = given.ndim - 1 - known_kind(layer).axes
    rows = given.movedim(axis, -1)
    for own in dict.fromkeys((axis, 1, term.ndim - 1)):
        if term.ndim > own and (terms := term.movedim(own, -1)).shape == rows.shape:
            scale = _scale(rows.flatten(0, -2).double(), terms.flatten(0, -2).double())
            if scale is not None:
                return Join(name, output, scale, axis, own)
    return None


def _scale(given: Float[Tensor, "places o"], term: Float[Tensor, "places o"]) -> Float[Tensor, " o"] | None:
    """What every channel of a layer's output is multiplied by to be a term, but for a shift; None if it is not all."""
    if len(given) < LEAST_PLACES:
        return None
    given, term = given - given.mean(0), term - term.mean(0)
    scale = (given * term).sum(0) / given.square().sum(0).clamp_min(1e-300)
    energy = float(term.square().sum())
    return scale if energy > 0 and float((term - given * scale).square().sum()) <= TOLERANCE * energy else None
