"""What is counted (parameters, MACs, bytes) and the limits a user sets on it, or on the error."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from rankfold.errors import BudgetError, UnknownNameError

UNITS = ("params", "macs", "bytes")
"""What is counted of a network."""
LATENCY = "latency"
"""What is measured of it: the time of a pass over the example inputs, in nanoseconds."""
RESOURCES = (*UNITS, LATENCY)
"""All that a budget can limit, beside the error."""

Limit = float | int | str
"""A fraction (float in (0, 1], or text such as "50%"), or an absolute count (int, or text such as "300M" or "8ms")."""

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTES = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_TIMES = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9}


@dataclass(frozen=True)
class Cost:
    """What a network, or one layer of it, costs.

    `params` counts each shared parameter once; `macs` are multiply-accumulates of one forward pass over the example
    inputs; `bytes` are those of parameters and persistent buffers as stored. `latency` is the time of that pass in
    nanoseconds where a budget limits it, measured or predicted, and else zero; costs that differ in it alone are equal.
    """

    params: int
    macs: int
    bytes: int
    latency: int = field(default=0, compare=False)

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, one) + getattr(other, one) for one in RESOURCES))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, one) - getattr(other, one) for one in RESOURCES))

    def times(self, part: int, whole: int) -> Cost:
        """The cost of some of `whole` equal parts, rounded down."""
        return Cost(*(getattr(self, one) * part // whole for one in RESOURCES))

    def as_dict(self) -> dict[str, int]:
        """The counts by unit, and the latency where it is known."""
        return {unit: getattr(self, unit) for unit in RESOURCES if unit != LATENCY or self.latency}

    def kept(self, original: Cost) -> dict[str, float]:
        """Fraction of `original` that is left, per unit."""
        return {unit: getattr(self, unit) / max(getattr(original, unit), 1) for unit in UNITS}


@dataclass(frozen=True)
class Budget:
    """Upper limits on the compressed network, in one or several units at once, or on what it loses.

    Each limit is a fraction of the original network (a float in (0, 1], or "50%") or an absolute count (an integer, or
    a text with a unit: "300M" parameters or MACs, "12MB" or "12MiB" bytes). `latency` is that of a pass over the
    example inputs on this machine, now: a fraction, or a text such as "8ms". With these alone the plan of least error
    is sought. `error` limits the squared relative error, in the plan's metric and as the mean over the layers that can
    be decomposed; then the cheapest plan is sought, counted in `minimise` (MACs, unless said otherwise), within the
    other limits where there are any. Raises BudgetError for anything else.
    """

    params: Limit | None = None
    macs: Limit | None = None
    bytes: Limit | None = None
    latency: Limit | None = None
    error: float | str | None = None
    minimise: str | None = None

    def __post_init__(self) -> None:
        if not self.given:
            raise BudgetError(
                "the budget is empty; state one or more of params, macs, bytes, latency and error, for example macs=0.5"
            )
        if self.minimise is not None and self.error is None:
            raise BudgetError(f"minimise={self.minimise} needs a limit on the error; add one, for example error=0.05")
        if self.minimise is not None and self.minimise not in RESOURCES:
            raise UnknownNameError("unit to minimise", self.minimise, RESOURCES)
        for unit in RESOURCES:
            if unit in self.given:
                _parse(unit, self.given[unit])
        if self.error is not None and not 0 < self.largest_error < 1:
            raise BudgetError(
                f"budget error={self.error} is not between 0 and 1; it is the mean squared relative error of the "
                "layers, for example 0.05"
            )

    @property
    def given(self) -> dict[str, Limit]:
        """What was stated, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @property
    def largest_error(self) -> float:
        """The limit on the mean squared relative error; infinite where none was stated."""
        if self.error is None:
            return math.inf
        try:
            return float(self.error)
        except ValueError:
            raise BudgetError(f"budget error={self.error!r} is not a number such as 0.05") from None

    @property
    def minimised(self) -> str:
        """What the best plan has least of: "error", or a unit where the error is what is limited."""
        return "error" if self.error is None else self.minimise or "macs"

    @property
    def units(self) -> tuple[str, ...]:
        """The units of cost that matter to the search."""
        return tuple(unit for unit in RESOURCES if unit in self.given or unit == self.minimised)

    def is_fraction(self, unit: str) -> bool:
        """Whether a limit is a share of what the original has."""
        return isinstance(_parse(unit, self.given[unit]), float)

    def limits(self, original: Cost) -> dict[str, int]:
        """The largest count allowed per limited unit, for a network that costs `original`."""
        limits = {}
        for unit in RESOURCES:
            if unit not in self.given:
                continue
            value = _parse(unit, self.given[unit])
            limits[unit] = math.floor(value * getattr(original, unit)) if isinstance(value, float) else value
        return limits

    @classmethod
    def parse(cls, texts: list[str]) -> Budget:
        """The budget spelled by texts such as "macs=0.5", "bytes=12MB", "error=0.05" or "minimise=params"."""
        limits: dict[str, str] = {}
        known = tuple(f.name for f in fields(cls))
        for text in texts:
            unit, separator, value = (part.strip() for part in text.partition("="))
            if not separator or not value:
                raise BudgetError(f"budget {text!r} is not of the form UNIT=LIMIT, for example macs=0.5 or bytes=12MB")
            if unit not in known:
                raise UnknownNameError("budget unit", unit, known)
            if unit in limits:
                raise BudgetError(f"budget {unit} is stated twice ({limits[unit]} and {value}); keep one")
            limits[unit] = value
        return cls(**limits)

    def __str__(self) -> str:
        return ", ".join(f"{unit}={limit}" for unit, limit in self.given.items())


def describe(counts: Mapping[str, int], original: Cost) -> str:
    """Absolute counts with the fraction of the original each one is: "macs=0.0312 (1,272,000)".

    The fraction is rounded up, so that it can be given back as a budget.
    """
    parts = []
    for unit, count in counts.items():
        fraction = math.ceil(count / max(getattr(original, unit), 1) * 1e4) / 1e4
        amount = f"{count / 1e6:.3g} ms" if unit == LATENCY else f"{count:,}"
        parts.append(f"{unit}={fraction:.4f} ({amount})")
    return ", ".join(parts)


def _parse(unit: str, limit: object) -> float | int:
    """A fraction as a float, an absolute count as an integer."""
    if isinstance(limit, str):
        return _parse_text(unit, limit)
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise BudgetError(f"budget {unit}={limit!r} is neither a number nor a text such as '0.5', '300M' or '12MB'")
    if isinstance(limit, float):
        return _fraction(unit, limit, limit)
    if unit == LATENCY and limit != 1:
        raise BudgetError(f"budget latency={limit} has no unit; write a fraction (0.6) or a time (8ms)")
    return float(limit) if unit == LATENCY else _absolute(unit, limit, limit)


def _parse_text(unit: str, text: str) -> float | int:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(%|[A-Za-zµ]*)\s*", text)
    if not match:
        raise BudgetError(f"budget {unit}={text!r} is not a number; write a fraction (0.5, 50%) or a count (300M)")
    number, suffix = match.group(1), match.group(2).lower()
    if suffix == "%":
        return _fraction(unit, float(number) / 100, text)
    if not suffix:
        return _parse(unit, int(number)) if number.isdigit() else _fraction(unit, float(number), text)
    scales = _TIMES if unit == LATENCY else {**_DECIMAL, **_BYTES} if unit == "bytes" else _DECIMAL
    if suffix not in scales:
        allowed = {"bytes": "kB, MB, GB, KiB, MiB, GiB", LATENCY: "us, ms, s"}.get(unit, "k, M, G")
        raise BudgetError(f"budget {unit}={text!r}: unknown suffix {match.group(2)!r}; allowed for {unit}: {allowed}")
    return _absolute(unit, math.floor(float(number) * scales[suffix]), text)


def _fraction(unit: str, value: float, given: object) -> float:
    if not 0 < value <= 1:
        hint = "; for an absolute count give an integer or a text such as '300M'" if value > 1 else ""
        raise BudgetError(f"budget {unit}={given} is not in (0, 1], the range of a fraction of the original{hint}")
    return float(value)


def _absolute(unit: str, value: int, given: object) -> int:
    if value < 1:
        raise BudgetError(f"budget {unit}={given} must be at least 1")
    return value
