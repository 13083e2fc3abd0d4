"""Channels: the hidden activations that may lose channels, found by running the network and not by names.

`following` tells what becomes of every layer's output. Channels have to stay where anything but a layer reads them,
where they are added to others (residual streams), where they leave the network, and where a layer that makes or reads
them must not be touched. What is left is a set of channels with the layers that make them and those that read them.
That the sets are right is tried by putting their channels in another order (`narrowing.tried`), which must not change
what the network gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rankfold.budget import Cost
from rankfold.network.costs import unfused
from rankfold.network.following import Followed, Following, Source
from rankfold.network.hooks import attached
from rankfold.network.kinds import kind_of, shape_of
from rankfold.network.passes import Inputs, run, tensors_in
from rankfold.plan import ChannelSet, LayerSpec, Port


@dataclass(frozen=True)
class Channels:
    """The sets of channels of a network that may be narrowed, and for other hidden ones, by layer, why they may not."""

    found: tuple[ChannelSet, ...]
    kept: Mapping[str, str]


def find_channels(
    model: nn.Module, inputs: Inputs, layers: Sequence[LayerSpec], skipped: Mapping[str, str]
) -> Channels:
    """The channel sets between the `layers` of a network; `skipped` names what must not be touched, and why."""
    following = Following(model)
    with unfused(), following, attached(following.hooks()):
        output = run(model, inputs)
    for tensor in tensors_in(output):
        following.block(tensor, "the network gives it out")
    following.settle()
    known = _Known(model, layers, skipped, following)
    found: list[ChannelSet] = []
    kept: dict[str, str] = {}
    for one in following.sets():
        made = known.channels(one)
        if isinstance(made, ChannelSet):
            found.append(made)
        else:
            kept.update(dict.fromkeys(sorted({source[0] for source in one.sources}), made))
    return Channels(tuple(found), kept)


class _Known:
    """What is known of a network's modules: which of them may change, and what they cost."""

    def __init__(
        self, model: nn.Module, layers: Sequence[LayerSpec], skipped: Mapping[str, str], following: Following
    ) -> None:
        self.model, self.skipped = model, skipped
        self.layers = {layer.name: layer for layer in layers}
        self.modules, self.divided = following.modules, following.divided
        self.users = Counter(name for one in following.sets() for name in {*one.between, *_readers(one)})

    def channels(self, one: Followed) -> ChannelSet | str:
        """What was followed as channels that may go, or why they may not."""
        producers = sorted(one.sources - self.divided.keys())
        names = list(dict.fromkeys([*(name for name, _, _ in producers), *_readers(one)]))
        parts = self._parts(names)
        size = producers[0][2] - producers[0][1]
        split = any(source in pieces for source in producers for pieces in self.divided.values())
        reason = one.reason or next(filter(None, map(self._unfit, dict.fromkeys([*names, *one.between]))), "")
        if not reason and not one.consumers:
            reason = "no layer reads it"
        if not reason and (parts == 0 or size % parts or size // parts < 2 or (parts > 1 and split)):
            reason = "the groups of its layers do not fit each other"
        if reason:
            return reason
        ports = tuple(Port(name, start) for name, start, _ in producers)
        consumers, between = tuple(one.consumers), tuple(one.between)
        return ChannelSet(
            consumers[0].layer, size, ports, consumers, between, parts, self._cost_between(between, producers)
        )

    def _parts(self, names: Sequence[str]) -> int:
        """Into how many parts, each to keep as many channels, the groups of layers divide them; 0 if they clash."""
        parts = 1
        for groups in sorted(shape_of(self.modules[name]).groups for name in names):
            if groups % parts:
                return 0
            parts = groups
        return parts

    def _unfit(self, name: str) -> str:
        """Why a layer, module or parameter must keep its channels."""
        module = self.modules.get(name)
        if name in self.skipped:
            return f"{name}: {self.skipped[name]}"
        if self.users[name] > 1:
            return f"{name} works on other channels too"
        if name in self.layers:
            return f"the weight of {name} is shared with other layers" if self.layers[name].aliases else ""
        return f"{name} is not one of the layers that may change" if module and kind_of(module) else ""

    def _cost_between(self, between: Iterable[str], producers: Iterable[Source]) -> Cost:
        """Parameters and bytes of what works channel by channel, weights of layers left out, and of the biases."""
        tensors: list[Tensor] = []
        buffers: list[Tensor] = []
        for name in between:
            if name not in self.modules:
                tensors.append(self.model.get_parameter(name))
                continue
            tensors += [one for one in self.modules[name].parameters() if one.ndim == 1]
            buffers += [one for one in self.modules[name].buffers() if one.ndim == 1]
        for name, start, stop in producers:
            bias = getattr(self.modules[name], "bias", None)
            tensors += [] if bias is None else [bias[start:stop]]
        size = sum(one.numel() * one.element_size() for one in (*tensors, *buffers))
        return Cost(sum(one.numel() for one in tensors), 0, size)


def _readers(one: Followed) -> list[str]:
    return [port.layer for port in one.consumers]
