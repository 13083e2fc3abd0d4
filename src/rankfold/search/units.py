"""Units: blocks of layers between which channels can go, as one curve each.

A unit's layers hang together by the channel sets that they make and read. A candidate says how many channels every set
keeps and what becomes of every layer: dense, or factors. Its error is the sum of those of its parts, each relative to
the output of the layer that it is made at: of the layers' factors, and of what is rebuilt at the layers that read a
set. Where prices are known the parts count by them. Its cost is exact: a layer's is that of its narrowed form, so it
depends on the width before it and the one behind. All candidates of a unit are found set by set (non-serial dynamic
programming: Bertelè and Brioschi 1972), with those left out that another one matches in the error and every cost;
where many are left, evenly spaced ones of them. In a row of many sets those are far apart: then, once a search has
chosen one, what lies around it is found the same way, from every width and form near its own, and the search goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rankfold.budget import RESOURCES, UNITS
from rankfold.decompositions.wiring import LayerShape
from rankfold.plan import INTERPOLATIVE
from rankfold.search.candidates import pareto
from rankfold.search.curves import Curve, FloatArray, IntArray
from rankfold.search.forms import costs_at
from rankfold.search.widths import Width

FORMS = 24
"""Forms of a layer in a unit, at most: dense, and evenly spaced ones of its own curve."""
FRONT = 48
"""Candidates kept for each width of the sets at hand, while a unit's are found."""
CANDIDATES = 256
"""Candidates of a unit, and of those around one that was chosen."""
MANY = 3
"""Sets of a unit from which on only some of their widths are taken at first."""
WIDTHS = 12
"""Widths of every set that such a unit takes at first."""
NEAR = 3
"""Places before and behind its own, of every width and form, that make up what lies around a candidate."""


@dataclass(frozen=True)
class UnitCurve(Curve):
    """The candidates of a unit: `choices[k]` has a place in `sets` for each width, then one for each layer's form.

    A form is 0 for the dense layer, otherwise the place in the layer's own curve in `members`. What lies around
    `centres`, rows of `choices`, is among the candidates.
    """

    sets: tuple[Width, ...] = ()
    members: tuple[Curve, ...] = ()
    choices: IntArray = field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))
    units: tuple[str, ...] = UNITS
    centres: tuple[tuple[int, ...], ...] = ()

    def family(self, k: int) -> str | None:
        """None: a unit is not fitted, its members are."""
        return None

    def settled(self, k: int) -> bool:
        """Whether no member's error is a guess; those that are interpolated between fits will do."""
        return not self.guessed(k)

    def guessed(self, k: int) -> bool:
        """Whether a member's error is."""
        return any(one.guessed(form) for one, form in zip(self.members, self.forms(k), strict=True))

    @property
    def parts(self) -> tuple[Curve, ...]:
        """The members' curves."""
        return self.members

    def of_parts(self, parts: Sequence[Curve]) -> UnitCurve:
        """The same sets between other curves of the members, whose candidates are in the same places."""
        return unit_curve(self.sets, parts, self.units, self.centres)

    def closer(self, k: int) -> Curve:
        """The unit with what lies around a candidate, or itself where it has all that, or few sets."""
        centre = tuple(map(int, self.choices[k]))
        if len(self.sets) < MANY or centre in self.centres:
            return self
        near = _front(self.sets, self.members, self.units, _around(self.sets, self.members, centre))
        whole = _Front.joined([_Front(self.errors, self.costs, self.choices), near])
        return _as_curve(whole, self.sets, self.members, self.units, (*self.centres, centre))

    def visited(self, places: Sequence[int], *, starts: int = 1) -> Curve:
        """The unit once what is guessed of the candidates at `places` is fitted."""
        chosen = [self.forms(k) for k in places]
        wanted = [
            sorted({forms[number] for forms in chosen if one.guessed(forms[number])})
            for number, one in enumerate(self.members)
        ]
        return self.of_parts(
            [one.visited(forms, starts=starts) for one, forms in zip(self.members, wanted, strict=True)]
        )

    def grounded(self) -> Curve:
        """The unit without members' candidates that are only bounded from below."""
        return unit_curve(self.sets, [one.grounded() for one in self.members], self.units)

    def known(self) -> Curve:
        """As `grounded`: no more than that is asked of a unit."""
        return self.grounded()

    def widths(self, k: int) -> dict[str, int]:
        """The width of every channel set in a candidate, by the set's name."""
        chosen = self.choices[k][: len(self.sets)]
        return {one.channels.name: one.widths[place] for one, place in zip(self.sets, chosen, strict=True)}

    def shapes(self, k: int) -> dict[str, LayerShape]:
        """The shape of every layer at the widths of a candidate, by the layer's name."""
        kept = {one.channels.name: self.widths(k)[one.channels.name] / one.channels.size for one in self.sets}
        found = {}
        for curve in self.members:
            sides = (_sets_of(curve.layer.name, self.sets, side) for side in ("outputs", "inputs"))
            outputs, inputs = (math.prod((kept[one.channels.name] for one in side), start=1.0) for side in sides)
            found[curve.layer.name] = curve.layer.shape.narrowed(outputs, inputs)
        return found

    def rebuilt(self, k: int) -> dict[str, float]:
        """The errors of a candidate's widths, by the layer that the channels are called after."""
        chosen = self.choices[k][: len(self.sets)]
        return {one.channels.name: one.errors[place] for one, place in zip(self.sets, chosen, strict=True)}

    def forms(self, k: int) -> list[int]:
        """The place in its own curve of every member in a candidate."""
        return [int(place) for place in self.choices[k][len(self.sets) :]]


def unit_curve(
    sets: Sequence[Width], members: Sequence[Curve], units: Sequence[str], centres: Sequence[Sequence[int]] = ()
) -> UnitCurve:
    """The candidates of a unit that can be part of an optimal plan, and what lies around some of them, as one curve."""
    widths = [_spread(len(one.widths), WIDTHS if len(sets) >= MANY else len(one.widths)) for one in sets]
    spread = [*widths, *(_spread(len(curve), FORMS) for curve in members)]
    allowed = [spread, *(_around(sets, members, one) for one in centres)]
    whole = _Front.joined([_front(sets, members, units, places) for places in allowed])
    return _as_curve(whole, sets, members, units, centres)


def _spread(size: int, most: int) -> list[int]:
    """Evenly spaced places of so many, the first and the last among them."""
    return [int(one) for one in np.unique(np.linspace(0, size - 1, min(most, size)).round())]


def _around(sets: Sequence[Width], members: Sequence[Curve], centre: Sequence[int]) -> list[list[int]]:
    """The places near a candidate's own, of the widths of every set and the forms of every layer, and the whole."""
    sizes = [*(len(one.widths) for one in sets), *map(len, members)]
    return [
        sorted({0, *range(max(place - NEAR, 0), min(place + NEAR + 1, size))})
        for place, size in zip(centre, sizes, strict=True)
    ]


def _front(
    sets: Sequence[Width], members: Sequence[Curve], units: Sequence[str], allowed: Sequence[Sequence[int]]
) -> _Front:
    """All candidates with widths and forms at the allowed places that can be part of an optimal plan."""
    places = {one.channels.name: k for k, one in enumerate(sets)}
    table: dict[tuple[int, ...], _Front] = {(): _Front.empty(len(sets) + len(members))}
    opened: list[int] = []
    for number, curve in enumerate(members):
        name, losses = curve.layer.name, curve.price.of(curve.errors)
        sides = tuple(_sets_of(name, sets, side) for side in ("outputs", "inputs"))
        for place in dict.fromkeys(places[one.channels.name] for side in sides for one in side):
            if not _touches(sets[place], members[:number]):
                opened.append(place)
                lost = sets[place].price.of(np.array(sets[place].errors))
                table = {
                    (*state, width): front.with_set(sets[place], place, width, float(lost[width]))
                    for state, front in table.items()
                    for width in allowed[place]
                }
        grown = {}
        for state, front in table.items():
            shares = [_share(side, places, opened, state, sets) for side in sides]
            shape = curve.layer.shape.narrowed(*shares)
            grown[state] = front.with_layer(
                curve, losses, shape, len(sets) + number, units, allowed[len(sets) + number]
            )
        table = grown
        for place in [one for one in opened if not _touches(sets[one], members[number + 1 :])]:
            at = opened.index(place)
            opened.remove(place)
            merged: dict[tuple[int, ...], list[_Front]] = {}
            for state, front in table.items():
                merged.setdefault(state[:at] + state[at + 1 :], []).append(front)
            table = {state: _Front.joined(fronts).thinned(units, FRONT) for state, fronts in merged.items()}
    return table[()].thinned(units, CANDIDATES)


@dataclass(frozen=True)
class _Front:
    """Candidates of part of a unit: errors, costs by unit, and what was chosen, -1 where nothing is yet."""

    errors: FloatArray
    costs: dict[str, IntArray]
    choices: IntArray

    @classmethod
    def empty(cls, size: int) -> _Front:
        """Nothing chosen, at no cost."""
        zero = np.zeros(1, dtype=np.int64)
        return cls(np.zeros(1), dict.fromkeys(RESOURCES, zero), np.full((1, size), -1, dtype=np.int64))

    @classmethod
    def joined(cls, fronts: Sequence[_Front]) -> _Front:
        """The candidates of several fronts."""
        return cls(
            np.concatenate([one.errors for one in fronts]),
            {unit: np.concatenate([one.costs[unit] for one in fronts]) for unit in RESOURCES},
            np.concatenate([one.choices for one in fronts]),
        )

    def with_set(self, one: Width, place: int, width: int, loss: float) -> _Front:
        """The candidates with a set at one of its widths, which costs so much."""
        kept, size = one.widths[width], one.channels.size
        costs = {unit: self.costs[unit] + getattr(one.channels.through, unit) * kept // size for unit in RESOURCES}
        choices = self.choices.copy()
        choices[:, place] = width
        return _Front(self.errors + loss, costs, choices)

    def with_layer(
        self,
        curve: Curve,
        losses: FloatArray,
        shape: LayerShape,
        place: int,
        units: Sequence[str],
        forms: Sequence[int],
    ) -> _Front:
        """The candidates with every one of some forms of a layer, at the size that it has between the chosen widths.

        The first form is the layer as it is; others stay where they are smaller.
        """
        own = costs_at(curve, forms, shape)
        stay = np.logical_and.reduce([own[unit] <= own[unit][0] for unit in units])
        stay &= np.logical_or.reduce([own[unit] < own[unit][0] for unit in units])
        stay[0] = True
        kept = np.array(forms)[stay]
        summed = (self.errors[:, None] + losses[kept]).ravel()
        costs: dict[str, IntArray] = {unit: (self.costs[unit][:, None] + own[unit][stay]).ravel() for unit in RESOURCES}
        choices = np.repeat(self.choices, len(kept), axis=0)
        choices[:, place] = np.tile(kept, len(self.errors))
        return _Front(summed, costs, choices).thinned(units, FRONT)

    def thinned(self, units: Sequence[str], most: int) -> _Front:
        """The candidates that no other one matches; of more than `most`, evenly spaced ones, by their costs."""
        kept = pareto(self.errors, [self.costs[unit] for unit in units])
        if len(kept) > most:
            kept = kept[_spread(len(kept), most)]
        return _Front(self.errors[kept], {unit: cost[kept] for unit, cost in self.costs.items()}, self.choices[kept])


def _as_curve(
    found: _Front,
    sets: Sequence[Width],
    members: Sequence[Curve],
    units: Sequence[str],
    centres: Sequence[Sequence[int]],
) -> UnitCurve:
    """What can be part of an optimal plan, of all candidates that were found, as a curve, dense first."""
    front = found.thinned(units, len(found.errors))
    dense = np.zeros((1, front.choices.shape[1]), dtype=np.int64)
    whole = {
        unit: sum(getattr(one.layer.dense, unit) for one in members)
        + sum(getattr(one.channels.through, unit) for one in sets)
        for unit in RESOURCES
    }
    others = np.flatnonzero(front.choices.any(1))
    others = others[np.argsort(-front.costs[units[0]][others], kind="stable")]
    errors = np.concatenate([[0.0], front.errors[others]])
    costs = {unit: np.concatenate([[whole[unit]], front.costs[unit][others]]).astype(np.int64) for unit in RESOURCES}
    choices = np.concatenate([dense, front.choices[others]])
    first = members[0].layer
    name = sets[0].channels.name
    return UnitCurve(
        replace(first, name=f"unit of {name}"),
        tuple(dict.fromkeys([*(name for one in members for name in one.tried), INTERPOLATIVE])),
        (None, *[INTERPOLATIVE] * len(others)),
        ((), *(_label(row, sets) for row in choices[1:])),
        errors,
        costs,
        errors,
        sets=tuple(sets),
        members=tuple(members),
        choices=choices,
        units=tuple(units),
        centres=tuple(map(tuple, centres)),
    )


def _label(row: IntArray, sets: Sequence[Width]) -> tuple[int, ...]:
    """What stands for ranks in a candidate of a unit: its widths, then the forms of its layers."""
    widths = [one.widths[place] for one, place in zip(sets, row, strict=False)]
    return (*widths, *(int(form) for form in row[len(sets) :]))


def _sets_of(layer: str, sets: Sequence[Width], side: str) -> list[Width]:
    """The sets that a layer makes or reads; one that works channel by channel does both."""
    found = []
    for one in sets:
        ports = one.channels.producers if side == "outputs" else one.channels.consumers
        if any(port.layer == layer for port in ports) or layer in one.channels.between:
            found.append(one)
    return found


def _share(
    side: Sequence[Width], places: Mapping[str, int], opened: Sequence[int], state: Sequence[int], sets: Sequence[Width]
) -> float:
    """Which part of a layer's outputs or inputs is kept at the widths of a state."""
    share = 1.0
    for one in side:
        place = places[one.channels.name]
        share *= one.widths[state[opened.index(place)]] / one.channels.size
    return share


def _touches(one: Width, members: Sequence[Curve]) -> bool:
    """Whether some of these layers make a set's channels, read them, or work on them."""
    names = {*one.channels.layers, *one.channels.between}
    return any(curve.layer.name in names for curve in members)
