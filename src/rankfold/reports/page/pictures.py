"""Pictures as inline SVG: lines over a horizontal axis, in the page's own colours, with a title that is read aloud."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 18, 36
MOST = 400
"""Points of a line that are drawn."""

Number = float | int
Points = Sequence[tuple[Number, Number]]


@dataclass(frozen=True)
class Axis:
    """A range of values and where they lie, from `start` to `end`."""

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    def place(self, value: Number) -> float:
        """Where a value lies."""
        low, high, at = (math.log(max(one, 1e-300)) if self.log else one for one in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[Number]:
        """A few round values."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            apart = max(1, (last - first) // 4)
            whole = [10.0**power for power in range(first, last + 1, apart)]
            parts = [one * 10.0**power for power in range(first - 1, last + 1) for one in (1, 2, 5)]
            return whole if last - first > 1 else [one for one in parts if self.low <= one <= self.high] or [self.low]
        rough = (self.high - self.low) / 5 or 1.0
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * one for one in (1, 2, 5, 10) if size * one >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [one * step for one in range(first, math.floor(self.high / step + 1e-9) + 1)]


def lines(
    title: str,
    series: Mapping[str, Points],
    across: str,
    up: str,
    *,
    log: bool = False,
    marked: Points = (),
) -> Markup:
    """Lines by name over a common axis; `marked` points stand out. Without any points there is no picture."""
    kept = {name: thinned([one for one in points if _drawn(one, log)]) for name, points in series.items()}
    everything = [one for points in (*kept.values(), [m for m in marked if _drawn(m, log)]) for one in points]
    if not everything:
        return Markup("")
    xs, ys = zip(*everything, strict=True)
    x_axis = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    low = min(ys) if log else min(0.0, *ys)
    y_axis = Axis(low, max(*ys, low * 1.0001 if log else low + 1e-12), HEIGHT - BOTTOM, TOP, log)
    parts = _frame(x_axis, y_axis, across, up)
    for place, (name, points) in enumerate(kept.items()):
        path = "L".join(f"{x_axis.place(x):.1f} {y_axis.place(y):.1f}" for x, y in points)
        if path:
            shape = '<path class="line s{}" d="M{}"><title>{}</title></path>'
            parts.append(Markup(shape).format(place % 6, path, name))
    for x, y in marked:
        if _drawn((x, y), log):
            circle = '<circle class="mark" cx="{:.1f}" cy="{:.1f}" r="5"/>'
            parts.append(Markup(circle).format(x_axis.place(x), y_axis.place(y)))
    return _picture(title, parts)


@dataclass(frozen=True)
class Spot:
    """A named point; without a height it is left out."""

    name: str
    x: Number
    y: Number | None


def spots(title: str, given: Sequence[Spot], across: str, up: str) -> Markup:
    """Named points over a common axis, each with its name beside it."""
    known = [(one.name, float(one.x), float(one.y)) for one in given if one.y is not None and math.isfinite(one.y)]
    if not known:
        return Markup("")
    xs, ys = [x for _, x, _ in known], [y for _, _, y in known]
    x_axis = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    spread = max(ys) - min(ys) or abs(ys[0]) or 1.0
    y_axis = Axis(min(ys) - spread / 10, max(ys) + spread / 10, HEIGHT - BOTTOM, TOP)
    parts = _frame(x_axis, y_axis, across, up)
    for name, x, y in known:
        left, high = x_axis.place(x), y_axis.place(y)
        circle = '<circle class="mark" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>'
        parts.append(Markup(circle).format(left, high, f"{name}: {number(x)}, {number(y)}"))
        beside = (left - 7, "end") if left > WIDTH / 2 else (left + 7, "start")
        parts.append(_text(beside[0], high - 5, name, beside[1]))
    return _picture(title, parts)


def thinned(points: Points) -> Points:
    """At most `MOST` of the points, evenly spaced, the last among them."""
    step = -(-len(points) // MOST) or 1
    return [*points[:-1:step], *points[-1:]]


def number(value: Number) -> str:
    """A number as short as it can be read."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    return f"{value:.4g}"


def _frame(x_axis: Axis, y_axis: Axis, across: str, up: str) -> list[Markup]:
    """The axes' names, ticks, and lines across."""
    parts = [_text(WIDTH / 2, HEIGHT - 4, across, "middle"), _text(4, TOP - 6, up, "start", "caption")]
    for value in x_axis.ticks():
        parts.append(_text(x_axis.place(value), HEIGHT - BOTTOM + 14, number(value), "middle"))
    for value in y_axis.ticks():
        at = y_axis.place(value)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, at, WIDTH - RIGHT))
        parts.append(_text(LEFT - 6, at + 4, number(value), "end"))
    return parts


def _picture(title: str, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)
    return head + Markup("").join(parts) + Markup("</svg>")


def _drawn(point: tuple[Number, Number], log: bool) -> bool:
    return all(map(math.isfinite, point)) and (point[1] > 0 or not log)


def _text(x: Number, y: Number, text: str, anchor: str, kind: str = "tick") -> Markup:
    shape = '<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
    return Markup(shape).format(kind, x, max(y, 10.0), anchor, text)
