"""In step: an original and its student, run over the same batches and stopped at one layer after another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfold.calibration.moments import count_of, forward_batch
from rankfold.calibration.patches import batches_needed
from rankfold.calibration.sums import LARGEST_MOMENT
from rankfold.calibration.walks import Walk, walking
from rankfold.decompositions.interpolative import by_group
from rankfold.memory import share
from rankfold.network.hooks import attached, first_given
from rankfold.network.joins import Join, find_joins
from rankfold.network.kinds import known_kind, shape_of
from rankfold.network.narrowing import rows_of
from rankfold.network.passes import Inputs, examples_in, few
from rankfold.network.tracing import followed, held_behind
from rankfold.plan import LayerPlan, Plan

_Stop = TypeVar("_Stop")
SHARE = 0.25
"""Part of the memory that passes may hold while they wait."""
LARGEST_SHARE = 2**30
"""Bytes that they may hold at most."""


@dataclass(frozen=True)
class Place:
    """A layer to be fitted: how often a pass calls it, and the batch norm, by name, that takes all it gives.

    `join` is where its outputs are added to a stream. `batches` is how many passes may wait there in memory.
    """

    layer: LayerPlan
    calls: int
    norm: str | None
    join: Join | None
    batches: int

    @property
    def paths(self) -> tuple[str, ...]:
        """All names of the layer."""
        return (self.layer.name, *self.layer.aliases)


@dataclass(frozen=True)
class Networks:
    """The original, the student, and the original as narrow as the student: its layers say how theirs are called."""

    model: nn.Module
    student: nn.Module
    skeleton: nn.Module
    plan: Plan

    def rows(self, place: Place, output: Tensor, thinning: slice) -> Float[Tensor, "g positions o"]:
        """What a layer of the original gave, one row per position, of the outputs that the student has."""
        module = self.model.get_submodule(place.layer.name)
        rows = _rows(module, output, thinning)
        if not place.layer.narrowed:
            return rows
        shape = shape_of(module)
        kept = rows_of(self.plan.narrowings, place.layer.name, shape.groups * shape.outputs)
        if shape.depthwise:
            return rows[kept]
        return torch.stack([rows[g][:, one] for g, one in enumerate(by_group(kept, shape.groups, shape.outputs))])


class Passes:
    """The passes of two networks over the same batches, from which a layer's outputs and inputs are taken in order.

    A batch is run once, its passes waiting at every layer: at layers of large inputs and outputs only as many batches
    as memory allows, the others start later. For layers that are called more than once all are run from the start.
    """

    def __init__(self, pair: Networks, batches: Iterable[Inputs], places: list[Place]) -> None:
        self.pair, self.batches, self.places = pair, batches, places
        self.walks: list[tuple[Walk, Walk]] = []

    def active(self, place: Place) -> int:
        """How many batches a layer is fitted to."""
        return min(place.batches, len(self.walks)) if place.calls == 1 else count_of(self.batches)

    def seen(self, place: Place) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For every call of a layer the batch's number, what it should give, and what goes into the student.

        It should give what the original's does, and where that is added to a stream what the student's stream lacks.
        """
        if place.calls == 1:
            number = self.places.index(place)
            for count, (original, student) in enumerate(self.walks[: self.active(place)]):
                output, x = original.to(number), student.to(number)
                if output is not None and x is not None:
                    if place.join is not None and number in original.kept.keys() & student.kept.keys():
                        output = output + place.join.needed(original.kept[number], student.kept[number])
                    yield count, output, x
            return
        for count, batch in enumerate(self.batches):
            given, own = (_calls(one, place, batch, count) for one in (self.pair.model, self.pair.student))
            for (_, output), (x, _) in zip(given, own, strict=True):
                yield count, output, x


@contextmanager
def in_step(pair: Networks, batches: Iterable[Inputs]) -> Iterator[Passes]:
    """The passes over the batches, none of them begun."""
    places = _in_order(pair.model, pair.plan, batches)
    passes = Passes(pair, batches, places)
    once = {number: place for number, place in enumerate(places) if place.calls == 1}
    joins = {number: place.join for number, place in once.items() if place.join is not None}

    def walks(model: nn.Module, *, outputs: bool) -> Any:
        modules = {model.get_submodule(place.layer.name): number for number, place in once.items()}
        streams = {number: (model.get_submodule(join.module), join.output) for number, join in joins.items()}
        return walking(model, modules, partial(forward_batch, model), batches, outputs=outputs, keeping=streams)

    with walks(pair.model, outputs=True) as original, walks(pair.student, outputs=False) as student:
        passes.walks = list(zip(original, student, strict=True))
        yield passes


def _in_order(model: nn.Module, plan: Plan, batches: Iterable[Inputs]) -> list[Place]:
    """The layers to be fitted, in the order of their first call, as a pass over one example tells.

    These are the changed ones, and behind the first of them all matrices that join a stream, which make up for what it
    lacks. Others then read what has been made up for, and need no fit but where they rebuild channels.
    Embeddings have no inputs to be fitted to, and experts may see others than the original's do: both stay as they are,
    as do matrices too wide for their moment to be kept whole. Where half the memory that passes may hold is enough for
    the patches that are looked at, they take no more.
    """
    owners = {model.get_submodule(path): layer for layer in plan.layers for path in (layer.name, *layer.aliases)}
    apart = {layer for module, layer in owners.items() if not _is_refitted(module)}
    owners = {module: layer for module, layer in owners.items() if layer not in apart}
    first = next(iter(batches))
    example = few([first], 1)[0]
    one_pass = partial(forward_batch, model, example, 0)
    order, followers = followed(model, owners, one_pass)
    norms = {owners[module]: norm for module, norm in followers.items()}
    calls = Counter(owners[module] for module in order)
    matrices = {layer for module, layer in owners.items() if known_kind(module).axes == 0}
    joins = {owners[module]: join for module, join in find_joins(model, owners, one_pass).items()}
    joins = {layer: join for layer, join in joins.items() if calls[layer] == 1 and layer in matrices | norms.keys()}
    rebuilding = {port.layer for one in plan.narrowings for port in one.channels.consumers}
    closing = matrices & joins.keys()
    made_up = matrices if closing else set[LayerPlan]()
    fitted = closing | {layer for layer in plan.changed if layer not in made_up or layer.name in rebuilding}
    behind = dropwhile(lambda layer: layer not in plan.changed, calls)
    calls = {layer: calls[layer] for layer in behind if layer in fitted}
    times = examples_in(first) / examples_in(example)
    needed: dict[LayerPlan, int] = {}

    def measure(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        needed[owners[module]] = math.ceil(batches_needed(module, output) / times)

    stops = [module for module, layer in owners.items() if layer in calls]
    with attached(module.register_forward_hook(measure) for module in stops):
        held = held_behind(stops, one_pass)
    sizes = {owners[module]: math.ceil(times * size) for module, size in held.items()}
    allowed = most_waiting({layer: sizes[layer] for layer in calls})
    fewer = {layer: min(most, max(most // 2, needed[layer])) for layer, most in allowed.items()}
    return [Place(layer, count, norms.get(layer), joins.get(layer), fewer[layer]) for layer, count in calls.items()]


def most_waiting(sizes: Mapping[_Stop, int]) -> dict[_Stop, int]:
    """How many passes of both networks may wait in memory at every stop, by the bytes that one of them holds there."""
    memory, largest = share(SHARE, LARGEST_SHARE), 1
    allowed: dict[_Stop, int] = {}
    for stop in reversed(list(sizes)):
        largest = max(largest, 2 * sizes[stop])
        allowed[stop] = max(1, int(memory / largest))
    return {stop: allowed[stop] for stop in sizes}


def _calls(model: nn.Module, place: Place, batch: Inputs, number: int) -> list[tuple[Tensor, Tensor]]:
    """What goes into a layer and comes out of it in a pass, call by call."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x = first_given(args, kwargs)
        seen.append((x.clone(), output.clone()))  # what follows may write into them

    modules = dict.fromkeys(model.get_submodule(path) for path in place.paths)
    with attached(module.register_forward_hook(see, with_kwargs=True) for module in modules):
        forward_batch(model, batch, number)
    return seen


def _is_refitted(module: nn.Module) -> bool:
    kind, shape = known_kind(module), shape_of(module)
    wide = kind.axes == 0 and shape.inputs > LARGEST_MOMENT
    return not (kind.lookup or kind.stacked or wide)


def _rows(module: nn.Module, output: Tensor, thinning: slice) -> Float[Tensor, "g positions o"]:
    """A layer's output as one row per position, group by group, in the order of its patches; float32 at least."""
    output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    axes, groups = known_kind(module).axes, shape_of(module).groups
    if axes == 0:
        return output.reshape(-1, output.shape[-1])[thinning][None]
    batched = (output if output.ndim == axes + 2 else output[None])[:, :, thinning]
    return batched.unflatten(1, (groups, -1)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
