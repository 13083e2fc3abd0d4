"""Wirings: what a decomposition is, before any number is computed.

A wiring names each factor's axes by letters, in the order in which the factors are applied to the input. Lower-case
letters are the axes of the weight: `o` outputs, `i` inputs, and `d`, `h`, `w` the kernel's taps. Upper-case letters are
bonds between factors; their sizes are the ranks. From the letters alone follow the factors' shapes, the stages that run
them as convolutions, and the exact parameter and multiply-accumulate (MAC) counts.

No torch here: this is bookkeeping, and a plan can be read and costed without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

TAPS = "dhw"
"""The letters of a kernel's axes; a layer with n spatial axes uses the last n."""

Count = TypeVar("Count", int, npt.NDArray[np.int64])


@dataclass(frozen=True)
class Call:
    """One call of a layer while the example inputs passed through the network.

    `batch` is the number of positions that are not spatial (for a Linear layer: all of them), `inputs` and `outputs`
    are the sizes of the spatial axes before and after, in the kernel's order. A `lookup` reads rows of the weight, one
    per position, and multiplies nothing: an embedding, whose rows are the outputs of the matrix it is.
    """

    batch: int
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    lookup: bool = False


@dataclass(frozen=True)
class LayerShape:
    """The shape of a layer's weight, one group at a time, and of the calls it serves.

    `outputs` and `inputs` are per group; `kernel` has one size per spatial axis. A transposed convolution does its
    work at the input's resolution, an ordinary one at the output's. Where the layer is `routed`, a position goes
    through one of the groups (experts), not through all.
    """

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    routed: bool = False
    calls: tuple[Call, ...] = field(default=(), compare=False)

    @property
    def axes(self) -> str:
        """Letters of the spatial axes, whatever the kernel's size along them."""
        return TAPS[len(TAPS) - len(self.kernel) :]

    @property
    def taps(self) -> str:
        """Letters of the spatial axes along which the kernel has more than one tap."""
        return "".join(axis for axis, size in zip(self.axes, self.kernel, strict=True) if size > 1)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every weight axis that a wiring of this layer can name."""
        taps = {axis: size for axis, size in zip(self.axes, self.kernel, strict=True) if size > 1}
        return {"o": self.outputs, "i": self.inputs, **taps}

    @property
    def params(self) -> int:
        """Entries of the dense weight, all groups together (the bias, which never changes, is not counted)."""
        return self.groups * self.outputs * self.inputs * math.prod(self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense layer over all its calls."""
        positions = self.positions("" if self.transposed else self.axes, lookups=False)
        return self.params // self.groups * self.passed * positions

    @property
    def passed(self) -> int:
        """How many groups a position goes through."""
        return 1 if self.routed else self.groups

    @property
    def depthwise(self) -> bool:
        """Whether every channel is a group of its own."""
        return self.groups > 1 and self.outputs == self.inputs == 1 and not self.routed

    def narrowed(self, outputs: float, inputs: float) -> LayerShape:
        """The shape of the layer with these shares of its outputs and inputs; of a depthwise one they are the same."""
        if self.depthwise:
            return replace(self, groups=round(self.groups * inputs))
        return replace(self, outputs=round(self.outputs * outputs), inputs=round(self.inputs * inputs))

    def positions(self, resized: str, *, lookups: bool = True) -> int:
        """Positions in the batch and in space, over all calls, once the axes in `resized` have their output's size.

        Without `lookups`, those of calls that read rows of the weight are left out.
        """
        total = 0
        for call in self.calls:
            if call.lookup and not lookups:
                continue
            sizes = zip(self.axes, call.inputs, call.outputs, strict=True)
            total += call.batch * math.prod(out if axis in resized else size for axis, size, out in sizes)
        return total


@dataclass(frozen=True)
class Stage:
    """What one factor does to the running activation, as letters.

    `summed` are the channel axes it contracts, `opened` those it makes, `kept` those it acts on one by one (a depthwise
    convolution's groups), `carried` those it does not touch (they travel in the batch), `taps` its kernel.
    """

    summed: str
    opened: str
    kept: str
    carried: str
    taps: str


@dataclass(frozen=True)
class Wiring:
    """A decomposition's factors, each spelled by the letters of its axes, in the order they are applied.

    `Wiring(("Ai", "BAhw", "oB"))` is the Tucker-2 form of a 2-D convolution. Raises ValueError when the letters do not
    spell a network: the input must enter in the first factor, the output leave in the last, every weight axis stand in
    one factor, and every bond in at least two.
    """

    factors: tuple[str, ...]

    def __post_init__(self) -> None:
        letters = "".join(self.factors)
        lower = [axis for axis in letters if axis.islower()]
        problems = {
            "the first factor must hold i": "i" not in self.factors[0],
            "the last factor must hold o": "o" not in self.factors[-1],
            "a weight axis stands in two factors": len(set(lower)) != len(lower),
            "an axis stands twice in a factor": any(len(set(factor)) != len(factor) for factor in self.factors),
            "a bond stands in one factor only": any(letters.count(bond) < 2 for bond in self.bonds),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(f"wiring {self.factors}: {problem}")

    @cached_property
    def bonds(self) -> tuple[str, ...]:
        """The bond letters in alphabetical order, which is the order of every tuple of ranks."""
        return tuple(sorted({axis for factor in self.factors for axis in factor if axis.isupper()}))

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """One stage per factor, found by walking the factors from the input to the output."""
        stages = []
        live = "i"
        for position, factor in enumerate(self.factors):
            later = "".join(self.factors[position + 1 :]) + "o"
            touched = [axis for axis in live if axis in factor]
            kept = "".join(axis for axis in touched if axis in later)
            summed = "".join(axis for axis in touched if axis not in later)
            carried = "".join(axis for axis in live if axis not in factor)
            taps = "".join(axis for axis in TAPS if axis in factor)
            opened = "".join(axis for axis in sorted(factor) if axis not in live and axis not in taps)
            stages.append(Stage(summed=summed, opened=opened, kept=kept, carried=carried, taps=taps))
            live = carried + kept + opened
        return tuple(stages)

    def resized(self, shape: LayerShape) -> tuple[str, ...]:
        """For each stage, the spatial axes whose stride and padding it applies.

        An axis goes with the stage that holds its taps. One without taps goes where it saves most: an ordinary
        convolution strides in its first stage, a transposed one in its last.
        """
        owned = [stage.taps for stage in self.stages]
        loose = "".join(axis for axis in shape.axes if axis not in shape.taps)
        owned[-1 if shape.transposed else 0] += loose
        return tuple("".join(axis for axis in shape.axes if axis in axes) for axes in owned)

    def sizes(self, shape: LayerShape, ranks: Sequence[Count]) -> dict[str, int | Count]:
        """Size of every letter; `ranks` are in the order of `bonds`, as integers or as equally long arrays."""
        return {**shape.sizes, **dict(zip(self.bonds, ranks, strict=True))}

    def factor_shape(self, position: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of one group's factor at `position`, in the order of its letters."""
        return tuple(sizes[axis] for axis in self.factors[position])

    def largest_ranks(self, shape: LayerShape, ranks: Sequence[Count]) -> list[Count]:
        """For each bond the largest rank of any use, given the others; elementwise when `ranks` are arrays.

        A bond between two factors cannot use more than either of them has in all its other axes; a bond that all
        factors share (CP) not more than one component per tap and singular vector of that tap's matrix.
        """
        sizes = self.sizes(shape, ranks)
        largest: list[Count] = []
        for bond in self.bonds:
            holders = [factor for factor in self.factors if bond in factor]
            rests = [product(sizes, factor.replace(bond, "")) for factor in holders]
            if len(holders) > 2:
                rests = [math.prod(shape.kernel) * min(shape.outputs, shape.inputs)]
            arrays = any(isinstance(rest, np.ndarray) for rest in rests)
            largest.append(reduce(np.minimum, rests) if arrays else min(rests))  # pyrefly: ignore[bad-argument-type]
        return largest

    def params(self, shape: LayerShape, ranks: Sequence[Count]) -> Count:
        """Entries of all factors of all groups; elementwise when `ranks` are arrays."""
        sizes = self.sizes(shape, ranks)
        total: Any = sum(shape.groups * product(sizes, factor) for factor in self.factors)
        return total

    def macs(self, shape: LayerShape, ranks: Sequence[Count]) -> Count:
        """Multiply-accumulates of all stages over all calls; elementwise when `ranks` are arrays."""
        sizes = self.sizes(shape, ranks)
        total: Any = 0
        done = ""
        for factor, stage, resized in zip(self.factors, self.stages, self.resized(shape), strict=True):
            at = done if shape.transposed else done + resized
            positions = shape.positions(at, lookups="o" not in factor)  # an embedding reads rows of the last factor
            total = total + shape.passed * positions * product(sizes, factor + stage.carried)
            done += resized
        return total


MATRIX = Wiring(("Ai", "oA"))
"""Two factors and one bond: what every decomposition becomes where there are no taps, on Linear and 1×1 layers."""


def product(sizes: Mapping[str, Any], letters: str) -> Any:
    """Product of the sizes of some letters, one for none: an integer, or an array where a size is one."""
    return math.prod(sizes[letter] for letter in letters)
