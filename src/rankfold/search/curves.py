"""Curves: error and cost per rank of a layer.

Where the closed form is far from the best (CP, rings), a candidate's error is known once it is fitted. A curve starts
with a few fits and interpolates between them; `visited` fits more, where a search wants to be sure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from torch import Tensor

from rankfold.decompositions import (
    DECOMPOSITIONS,
    Expansion,
    Factors,
    balance,
    family_of,
    fit,
    is_matrix,
    metric_error,
    wiring_of,
)
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.decompositions.wiring import LayerShape
from rankfold.plan import LayerSpec

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """A candidate that was fitted: its ranks, its parameters, and its error over that before the fit.

    `full` says that it was fitted as a plan would have it, not with fewer rounds for a first idea of the curve; then
    `factors` are those that reach the error.
    """

    ranks: tuple[int, ...]
    params: int
    ratio: float
    full: bool = False
    factors: Factors | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Price:
    """What errors cost the network, from what some were found to: `losses` at rising `errors`; without any, as much.

    Between those found it goes by a power of the error, of `SLOPES` alone. Below the first it is in proportion, and
    beyond the last at least that.
    """

    errors: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()

    def of(self, errors: FloatArray) -> FloatArray:
        """The loss at each of some errors; zero at zero."""
        if not self.errors:
            return errors
        known, losses = np.log(self.errors), np.log(self.losses)
        slopes = [*np.clip(np.diff(losses) / np.diff(known), *SLOPES)]
        at = np.log(np.maximum(errors, 1e-300))
        found = losses[0] + np.minimum(at - known[0], 0.0)
        beyond = max([1.0, *slopes[-1:]])
        for start, end, slope in zip(known, [*known[1:], np.inf], [*slopes, beyond], strict=True):
            found += slope * (np.clip(at, start, end) - start)
        return np.where(errors > 0, np.exp(found), 0.0)


SLOPES = (0.5, 3.0)
"""Powers of errors by which losses are taken to rise."""


@dataclass(frozen=True)
class Curve:
    """A layer's candidates, cheapest last; the first is always the layer as it is, at error zero.

    `tried` are the decompositions that were asked for. `methods[k]` is the decomposition's name (None: dense),
    `ranks[k]` one rank per bond, `errors[k]` the squared relative error, `costs[unit][k]` the weight's cost.
    `closed[k]` is the error before any fit, which `errors` equals where none is needed; elsewhere it is scaled by what
    the `fits` of the same family reached. Errors are in the metric of the layer's entry in `moments`, if it has one,
    in which every candidate is fitted.
    `weight` is the weight that was measured, None where the errors are given and final. `exact` is the expansion of a
    matrix in its metric, from which the best factors of any rank are read off. `price` is what errors cost the
    network, beside those of other curves.
    """

    layer: LayerSpec
    tried: tuple[str, ...]
    methods: tuple[str | None, ...]
    ranks: tuple[tuple[int, ...], ...]
    errors: FloatArray
    costs: dict[str, IntArray]
    closed: FloatArray = field(default_factory=lambda: np.empty(0))
    fits: Mapping[str, tuple[Fit, ...]] = field(default_factory=dict)
    weight: Float[Tensor, "g o i *taps"] | None = None
    moments: Mapping[str, Moment] = field(default_factory=dict, compare=False, repr=False)
    exact: Expansion | None = field(default=None, compare=False, repr=False)
    price: Price = Price()

    def __len__(self) -> int:
        return len(self.errors)

    @property
    def moment(self) -> Moment:
        """What the errors are measured by."""
        return self.moments.get(self.layer.name, IDENTITY)

    def settled(self, k: int) -> bool:
        """Whether the error of a candidate is known, and not interpolated between others."""
        family = self.family(k)
        if family is None or self.weight is None:
            return True
        return any(one.full and one.ranks == self.ranks[k] for one in self.fits.get(family, ()))

    def bounded(self, k: int) -> bool:
        """Whether a candidate's error is a bound from below, scaled by those of others that were fitted."""
        method = self.methods[k]
        return method is not None and not self.settled(k) and DECOMPOSITIONS[method].optimistic

    def guessed(self, k: int) -> bool:
        """Whether a candidate's error is such a bound, or that of one smaller than all that were fitted."""
        if self.settled(k):
            return False
        fits = self.fits.get(cast(str, self.family(k)), ())
        return self.bounded(k) or all(one.params > self.costs["params"][k] for one in fits)

    def visited(self, places: Sequence[int], *, starts: int = 1) -> Curve:
        """The curve once those at `places` are fitted, from so many `starts`, and the others interpolated anew."""
        fits = {name: list(known) for name, known in self.fits.items()}
        for k in places:
            if self.settled(k):
                continue
            method, weight = cast(str, self.methods[k]), cast(Tensor, self.weight)
            layer, ranks, moment = self.layer, self.ranks[k], self.moment
            factors = fit(method, weight, layer.shape, ranks, layer=layer.name, starts=starts, moment=moment)
            reached = metric_error(weight, wiring_of(method, layer.shape), factors, moment)
            ratio = reached / max(float(self.closed[k]), 1e-300)
            one = Fit(ranks, int(self.costs["params"][k]), ratio, True, factors)
            fits.setdefault(cast(str, self.family(k)), []).append(one)
        return refitted(self, fits)

    @property
    def parts(self) -> tuple[Curve, ...]:
        """The curves of the layers that it is made of: itself, where it is one layer's."""
        return (self,)

    def of_parts(self, parts: Sequence[Curve]) -> Curve:
        """The curve with other `parts`, of the same layers."""
        (part,) = parts
        return part

    def closer(self, k: int) -> Curve:
        """The curve with more candidates around one, where it has only some: of a layer it has all."""
        return self

    def grounded(self) -> Curve:
        """The curve without candidates that are only bounded from below."""
        return subset(self, np.flatnonzero([not self.bounded(k) for k in range(len(self))]))

    def known(self) -> Curve:
        """The curve with the candidates alone whose errors are known."""
        return subset(self, np.flatnonzero([self.settled(k) for k in range(len(self))]))

    def factors(self, k: int) -> Factors | None:
        """The factors of a candidate, where it was fitted as a plan would have it."""
        if self.exact is not None and self.methods[k] is not None:
            return balance(self.exact.wiring, self.exact.factors(self.ranks[k]))
        known = self.fits.get(self.family(k) or "", ())
        return next((one.factors for one in known if one.ranks == self.ranks[k] and one.factors is not None), None)

    def family(self, k: int) -> str | None:
        """The family of candidates that a candidate is fitted among; None where its error is that of a closed form."""
        method = self.methods[k]
        known = self.layer.name in self.moments
        return None if method is None else family_in(method, self.layer.shape, self.ranks[k], known)


def family_in(name: str, shape: LayerShape, ranks: Sequence[int], metric: bool) -> str | None:
    """The family of `family_of`; in a metric what needs no fit otherwise is one as well, of the method's name."""
    exact = not metric or is_matrix(wiring_of(name, shape))
    return family_of(name, shape, ranks) or (None if exact else name)


def refitted(curve: Curve, fits: Mapping[str, Sequence[Fit]]) -> Curve:
    """The curve with these fits in place of its own, and its errors interpolated between them."""
    errors = curve.closed.copy()
    families = [curve.family(k) for k in range(len(curve))]
    for family, known in fits.items():
        own = np.flatnonzero([name == family for name in families])
        scale = ratios(curve.costs["params"][own], known)
        measured = {one.ranks: one.ratio for one in sorted(known, key=lambda one: one.full)}
        errors[own] *= [measured.get(curve.ranks[k], ratio) for k, ratio in zip(own, scale, strict=True)]
    return replace(curve, errors=errors, fits={name: tuple(known) for name, known in fits.items()})


def subset(curve: Curve, chosen: IntArray) -> Curve:
    """The curve with the chosen candidates alone, in their order."""
    return replace(
        curve,
        methods=tuple(curve.methods[k] for k in chosen),
        ranks=tuple(curve.ranks[k] for k in chosen),
        errors=curve.errors[chosen],
        costs={unit: cost[chosen] for unit, cost in curve.costs.items()},
        closed=curve.closed[chosen] if len(curve.closed) else curve.closed,
    )


def ratios(params: IntArray, fits: Sequence[Fit]) -> FloatArray:
    """The fits' ratios, interpolated over the logarithm of the parameters; of fits of one size the best counts."""
    best: dict[int, float] = {}
    for one in fits:
        best[one.params] = min(one.ratio, best.get(one.params, np.inf))
    sizes = sorted(best)
    return np.interp(np.log(params), np.log(sizes), [best[size] for size in sizes])
