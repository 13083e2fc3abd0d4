"""Times in context: what layers and the operators between them take in passes of their own network.

An operation alone is faster than in a network, where weights come from further away, or slower; so layers are timed
where they are, and what their other forms take is told from operations alone by the same factor. Operators that work on
hidden channels, one by one, take as much less as there are fewer channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.budget import LATENCY
from rankfold.network.costs import unfused
from rankfold.network.following import Following
from rankfold.network.hooks import attached
from rankfold.network.kinds import known_kind
from rankfold.network.passes import Inputs, describe_inputs, examples_in, run, tensors_in
from rankfold.network.timing.operations import Machine, Stopwatch
from rankfold.network.timing.stages import LayerTimes
from rankfold.network.timing.turns import finished, latency
from rankfold.plan import ChannelSet, LayerSpec
from rankfold.progress import Progress, silent

SECONDS = 4.0
"""How long a network is watched, about."""
PASSES = (3, 30, 300)
"""Passes that are watched, at least and at most, and those that are only timed."""


@dataclass(frozen=True)
class Timed:
    """The layers and channel sets of a network with their times, and what a pass takes in all, in nanoseconds.

    `untimed` says of layers why they have none.
    """

    layers: tuple[LayerSpec, ...]
    sets: tuple[ChannelSet, ...]
    total: int
    untimed: Mapping[str, str]


def timed(
    model: nn.Module,
    original: nn.Module,
    inputs: Inputs,
    layers: Sequence[LayerSpec],
    sets: Sequence[ChannelSet],
    *,
    compiled: bool = False,
    progress: Progress = silent,
) -> Timed:
    """The layers of a network, and the channel sets between them, with what they take in a pass over the inputs.

    The network is the `original` opened; what a pass takes in all is that of the original, `compiled` or as it is.
    Parts are watched as they are, and scaled to what the compiled network takes.
    """
    given, device = tensors_in(inputs), _device(model, inputs)
    watch = Stopwatch.opened(device)
    progress("timing the network", 0, len(layers))
    (whole,) = latency([original], inputs, rounds=PASSES[2], seconds=SECONDS, compiled=compiled)
    taken = _watched(model, inputs, device, whole)
    found, untimed = [], {}
    for done, layer in enumerate(layers):
        progress("timing the network", done, len(layers))
        module = model.get_submodule(layer.name)
        if known_kind(module).lookup or known_kind(module).stacked:
            untimed[layer.name] = f"what a {layer.kind} takes hangs on more than its size, and latency is limited"
            continue
        times = LayerTimes(module, layer.shape, watch, _channels_last(module, given))
        own = sum(taken.modules.get(name, 0.0) for name in (layer.name, *layer.aliases))
        found.append(replace(layer, times=times.calibrated(own)))
    progress("timing the network", len(layers), len(layers))
    names = {layer.name for layer in layers}
    return Timed(tuple(found), tuple(_with_time(one, taken, names) for one in sets), round(1e6 * whole), untimed)


def timing_of(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """What times of a network on some inputs are of: the machine, its threads, and the form of the inputs."""
    first = next(model.parameters(), None)
    return {
        **asdict(Machine.here(_device(model, inputs))),
        "inputs": describe_inputs(inputs),
        "batch": examples_in(inputs),
        "channels_last": _channels_last(model, tensors_in(inputs)),
        "dtype": str(first.dtype).removeprefix("torch.") if first is not None else "",
    }


def _device(model: nn.Module, inputs: Inputs) -> torch.device:
    """Where a network runs on some inputs."""
    return next((one.device for one in (*model.parameters(), *tensors_in(inputs))), torch.device("cpu"))


@dataclass(frozen=True)
class _Taken:
    """Nanoseconds by module's name, and of operators outside of modules by the channels that they give."""

    modules: Mapping[str, float]
    channels: Mapping[tuple[str, int, int], float]


class _Watching(Following):
    """A pass whose operators are timed, and put down to the layer that they run in, or the channels that they give."""

    def __init__(self, model: nn.Module, device: torch.device, overhead: float = 0.0) -> None:
        super().__init__(model)
        self.device, self.overhead = device, overhead
        self.running: list[str] = []
        self.taken: dict[Any, float] = {}

    def hooks(self) -> Iterable[Any]:
        """As those that follow, with the name of the innermost module at hand."""

        def enter(module: nn.Module, *_: Any) -> None:
            self.running.append(self.names[module])

        def leave(module: nn.Module, *_: Any) -> None:
            self.running.pop()

        for module in self.modules.values():
            yield module.register_forward_pre_hook(enter)
        yield from super().hooks()
        for module in self.modules.values():
            yield module.register_forward_hook(leave, always_call=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        finished(self.device)
        seconds = time.perf_counter() - start
        if self.inside:
            place: Any = self.running[-1]
        else:
            self._follow(str(func._overloadpacket), func.name(), args, kwargs or {}, out)
            first = out if isinstance(out, Tensor) else next(iter(tensors_in(out)), None)
            tag = self.tag_of(first)
            place, seconds = (tag.source if tag else None), max(seconds - self.overhead, 0.0)
        self.taken[place] = self.taken.get(place, 0.0) + seconds
        return out


def _watched(model: nn.Module, inputs: Inputs, device: torch.device, whole: float) -> _Taken:
    """Medians over some passes; no more in all than the milliseconds of a `whole` pass that nobody watches."""
    passes = int(1e3 * SECONDS / max(whole, 1e-3))
    small = torch.zeros(1, device=device)
    alone = _Watching(nn.Identity(), device)
    with torch.no_grad(), alone:
        for _ in range(200):
            small.relu()
    overhead = alone.taken.get(None, 0.0) / 200
    found: list[dict[Any, float]] = []
    for _ in range(1 + min(max(passes, PASSES[0]), PASSES[1])):
        one = _Watching(model, device, overhead)
        with unfused(), one, attached(one.hooks()):
            run(model, inputs)
        found.append(one.taken)
    middle = {place: 1e9 * median(one.get(place, 0.0) for one in found[1:]) for place in found[-1]}
    scale = min(1.0, 1e6 * whole / max(sum(middle.values()), 1.0))
    middle = {place: scale * taken for place, taken in middle.items()}
    return _Taken(
        {place: taken for place, taken in middle.items() if isinstance(place, str)},
        {place: taken for place, taken in middle.items() if isinstance(place, tuple)},
    )


def _with_time(one: ChannelSet, taken: _Taken, layers: set[str]) -> ChannelSet:
    """A channel set with the time of what works on its channels one by one, but for layers, which have their own."""
    sources = [(port.layer, port.start, port.start + one.size) for port in one.producers]
    total = sum(taken.channels.get(source, 0.0) for source in sources)
    total += sum(taken.modules.get(name, 0.0) for name in one.between if name not in layers)
    return replace(one, through=replace(one.through, **{LATENCY: round(total)}))


def _channels_last(module: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether a layer runs on images that keep their channels together."""
    last = torch.channels_last
    images = [one for one in (*inputs, getattr(module, "weight", None)) if isinstance(one, Tensor) and one.ndim == 4]
    return any(one.is_contiguous(memory_format=last) and not one.is_contiguous() for one in images)
