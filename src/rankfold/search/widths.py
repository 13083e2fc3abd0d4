"""Widths: the order in which the channels of a set go, and the error for every number of them that may stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from rankfold.decompositions.interpolative import Elimination, eliminate, entries, interpolation_error
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.plan import ChannelSet, LayerSpec
from rankfold.search.curves import Price

WIDTHS = 24
"""Widths of a channel set that are candidates, at most."""
FINE = 48
"""The same where a unit has many sets, which takes only some of them at first."""
SEEN = 1.5
"""Inputs that a layer must have seen for each channel that it reads, for their moment to be relied on."""
LARGEST_IDENTITY = 4608
"""Inputs of a layer that reads channels, at most, where their moment is not known as a whole."""


@dataclass(frozen=True)
class Width:
    """A channel set with the order in which its channels go, and the error at the outputs of what reads them.

    `errors[k]` is the error with `widths[k]` channels; the first width is the whole. `price` is what errors cost the
    network.
    """

    channels: ChannelSet
    elimination: Elimination
    widths: tuple[int, ...]
    errors: tuple[float, ...]
    price: Price = field(default_factory=Price)


def width_grid(channels: ChannelSet, linear: bool, align: int | None, most: int) -> tuple[int, ...]:
    """The widths of a set that are candidates, widest first.

    They are multiples of `align`; where it is not given, of 8 on Linear layers wider than 64, and of the number of
    parts in any case.
    """
    step = align if align is not None else 8 if linear and channels.size > 64 else 1
    step = int(np.lcm(step, channels.parts))
    if channels.size // step < 4:
        step = channels.parts
    whole = channels.size // step
    fewest = max(1, round(whole / 16))
    steps = np.unique(np.linspace(fewest, whole, min(most, whole - fewest + 1)).round().astype(int))
    widths = [int(one) * step for one in steps]
    return tuple(dict.fromkeys([channels.size, *reversed(widths)]))


def measure_width(
    channels: ChannelSet,
    layers: Mapping[str, LayerSpec],
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Moment],
    *,
    align: int | None,
    most: int,
) -> Width | str:
    """A channel set with the order in which its channels go and its widths, or why it has none.

    `weights` (g, o, i, *taps) and `moments` are those of the layers that read it. The order is that of the one that
    multiplies most; the error is the sum over all.
    """
    readers = sorted((port.layer for port in channels.consumers), key=lambda name: -layers[name].shape.macs)
    for name in readers:
        size = weights[name][0, 0].numel()
        if moments.get(name, IDENTITY).joint is None and size > LARGEST_IDENTITY:
            return f"{name} has {size:,} inputs, too many for what is known of them to be told apart"
    first, *others = readers
    seen = moments.get(first, IDENTITY).positions
    if 0 < seen < SEEN * channels.size:
        return f"{first} has seen {seen} inputs, too few for {channels.size} channels; give more to calibrate on"
    linear = not layers[first].shape.kernel
    elimination = eliminate(weights[first], moments.get(first, IDENTITY), channels.size, channels.parts)
    widths = width_grid(channels, linear, align, most)
    errors = np.array([elimination.error(width) for width in widths])
    inner = {port.layer: port.inner for port in channels.consumers}
    for name in others:
        weight, moment = weights[name], moments.get(name, IDENTITY)
        for place, width in enumerate(widths[1:], 1):
            columns = entries(elimination.kept(width), inner[name])
            errors[place] += interpolation_error(weight, moment, columns)
    return Width(channels, elimination, widths, tuple(np.maximum.accumulate(errors).tolist()))


def units_of(sets: Sequence[ChannelSet], layers: Mapping[str, LayerSpec]) -> list[tuple[ChannelSet, ...]]:
    """The sets in groups that hang together by layers they share, in the order in which they were found."""
    groups: list[list[ChannelSet]] = []
    for one in sets:
        own = _touched(one, layers)
        linked = [group for group in groups if any(own & _touched(other, layers) for other in group)]
        merged = [other for group in linked for other in group] + [one]
        groups = [group for group in groups if group not in linked] + [merged]
    return [tuple(group) for group in groups]


def _touched(one: ChannelSet, layers: Mapping[str, LayerSpec]) -> set[str]:
    return {*one.layers, *(name for name in one.between if name in layers)}
