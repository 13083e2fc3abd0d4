"""Stages: what every form of a layer takes, from times of stock operations of other sizes.

A layer's form is a row of stages, each a stock layer (`network/kinds`). Their times are measured at some channel
counts, the `LADDER`'s and the layer's own, and in between taken to be linear in every count.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from rankfold.decompositions.wiring import Call, LayerShape, Wiring, product
from rankfold.network.kinds import known_kind, stage_options
from rankfold.network.timing.operations import Operation, Stopwatch
from rankfold.plan import LayerSpec

LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 72, 104, 152, 216, 304, 432, 616, 872, 1232, 1744, 2464, 3488, 4928)
"""Channel counts at which operations are timed.

Powers of two above 32 are not among them: rows of such lengths meet in the same lines of a cache, and are slower.
"""

Counts = tuple[int, int, int, int]
"""Channels that a stage sums over and those it makes, of each group; groups; and what it carries along in the batch."""


@dataclass(frozen=True)
class Geometry:
    """A stage on the input of one call, but for its counts."""

    kind: str
    batch: int
    sizes: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    dtype: str
    channels_last: bool

    def operation(self, counts: Counts) -> Operation:
        """The stock layer that the stage is at some counts."""
        summed, opened, groups, carried = counts
        return Operation(
            self.kind,
            self.batch * carried,
            summed * groups,
            opened * groups,
            groups,
            self.sizes,
            dtype=self.dtype,
            channels_last=self.channels_last,
            **dict(self.options),
        )


@dataclass(frozen=True)
class LayerTimes:
    """Nanoseconds that a layer takes in its network, as `plan.Times`.

    `factor` is what it took there over what its operation takes alone.
    """

    module: nn.Module
    whole: LayerShape
    watch: Stopwatch
    channels_last: bool
    factor: float = 1.0
    found: dict[tuple[Geometry, Counts], float] = field(default_factory=dict, repr=False)
    geometries: dict[tuple[Any, ...], Geometry] = field(default_factory=dict, repr=False)

    def __call__(self, shape: LayerShape, wiring: Wiring | None = None, ranks: Sequence[Any] = ()) -> Any:
        """The time of a form; of several, where ranks are arrays."""
        if wiring is None or not any(isinstance(rank, np.ndarray) for rank in ranks):
            return self._of(shape, wiring, ranks)
        rows = np.stack([np.asarray(rank) for rank in ranks], 1)
        return np.array([self._of(shape, wiring, row.tolist()) for row in rows], dtype=np.int64)

    def alone(self) -> float:
        """What the layer's operation takes by itself."""
        return sum(times * self._time(*stage) for call, times in self._calls for stage in self._dense(self.whole, call))

    def calibrated(self, taken: float) -> LayerTimes:
        """The same, of a layer that takes so long in its network."""
        return replace(self, factor=taken / max(self.alone(), 1.0))

    def _of(self, shape: LayerShape, wiring: Wiring | None, ranks: Sequence[int]) -> int:
        if wiring is None and shape != self.whole:  # no slower than the layer: what says so is noise
            return min(self._sum(shape), self._sum(self.whole))
        return self._sum(shape, wiring, ranks)

    def _sum(self, shape: LayerShape, wiring: Wiring | None = None, ranks: Sequence[int] = ()) -> int:
        total = 0.0
        for call, times in self._calls:
            stages = self._factors(shape, wiring, ranks, call) if wiring else self._dense(shape, call)
            total += times * sum(self._time(*stage) for stage in stages)
        return round(self.factor * total)

    @cached_property
    def _calls(self) -> list[tuple[Call, int]]:
        return list(Counter(self.whole.calls).items())

    def _dense(self, shape: LayerShape, call: Call) -> Iterator[tuple[Geometry, Counts]]:
        geometry = self._geometry(call, call.inputs, shape.axes, shape.taps)
        yield geometry, (shape.inputs, shape.outputs, shape.groups, 1)

    def _factors(
        self, shape: LayerShape, wiring: Wiring, ranks: Sequence[int], call: Call
    ) -> Iterator[tuple[Geometry, Counts]]:
        sizes = cast(dict[str, int], wiring.sizes(shape, list(ranks)))
        done = ""
        for stage, resized in zip(wiring.stages, wiring.resized(shape), strict=True):
            given = zip(shape.axes, call.inputs, call.outputs, strict=True)
            at = tuple(out if axis in done else size for axis, size, out in given)
            summed, opened, kept, carried = (
                product(sizes, letters) for letters in (stage.summed, stage.opened, stage.kept, stage.carried)
            )
            yield self._geometry(call, at, resized, stage.taps), (summed, opened, kept * shape.groups, carried)
            done += resized

    def _geometry(self, call: Call, at: tuple[int, ...], resized: str, taps: str) -> Geometry:
        """A stage that works on an input of these sizes, and strides and pads along the axes in `resized`."""
        key = (call.batch, at, resized, taps)
        if key not in self.geometries:
            self.geometries[key] = self._made(*key)
        return self.geometries[key]

    def _made(self, batch: int, at: tuple[int, ...], resized: str, taps: str) -> Geometry:
        kind, module, shape = known_kind(self.module), cast(Any, self.module), self.whole
        transposed = kind.transposed and bool(resized) and bool(kind.axes)
        dtype = str(cast(Tensor, module.weight).dtype).removeprefix("torch.")
        options: dict[str, Any] = {}
        if kind.axes:
            own = zip(shape.axes, shape.kernel, strict=True)
            options["kernel"] = tuple(size if axis in taps else 1 for axis, size in own)
            options |= stage_options(module, resized)
        named = kind.name if transposed else kind.pointwise.__name__
        last = self.channels_last and kind.axes == 2
        return Geometry(named, batch, at, tuple(sorted(options.items())), dtype, last)

    def _time(self, geometry: Geometry, counts: Counts) -> float:
        """The time of a stage, between those of its neighbours on the ladder."""
        key = (geometry, counts)
        if key not in self.found:
            own = (self.whole.inputs, self.whole.outputs, self.whole.groups, 1)
            sides = [_between(count, whole) for count, whole in zip(counts, own, strict=True)]
            self.found[key] = sum(
                math.prod(share for _, share in corner)
                * self.watch.of(geometry.operation(cast(Counts, tuple(at for at, _ in corner))))
                for corner in itertools.product(*sides)
            )
        return self.found[key]


def _between(count: int, whole: int) -> list[tuple[int, float]]:
    """The counts beside one at which times are measured, with their shares; a layer's own count is one of them."""
    if count == whole or count == 1:
        return [(count, 1.0)]
    place = bisect.bisect_left(LADDER, count)
    if place < len(LADDER) and LADDER[place] == count:
        return [(count, 1.0)]
    below = LADDER[place - 1]
    above = LADDER[place] if place < len(LADDER) else 2 * below
    if below < whole < count:
        below = whole
    elif count < whole < above:
        above = whole
    if not below < count <= above:  # far beyond the ladder
        return [(count, 1.0)]
    share = (count - below) / (above - below)
    return [(below, 1.0 - share), (above, share)]


def remember(layers: Iterable[LayerSpec]) -> None:
    """Keeps for the next time what was measured of layers' operations."""
    for watch in {id(one.times.watch): one.times.watch for one in layers if isinstance(one.times, LayerTimes)}.values():
        watch.save()
