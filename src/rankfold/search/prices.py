"""Prices: what an error of a layer or of a channel set costs the network, measured by making it there alone.

Relative errors of layers are no common measure: a classifier that loses a hundredth of its output is not a first layer
that does. So each one is given an error of about `TRIAL` by itself, on a few of the calibration inputs, and the
divergence of the network's output from the original's, over that error, is its price. Damage done in many places
together is more than the sum of what is done in each, and more so the larger it is: prices times errors are summed to
a `POWER`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from torch import Tensor, nn

from rankfold.decompositions import expand, is_matrix, reconstruct, wiring_of
from rankfold.decompositions.interpolative import entries, interpolated, padded
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.network.kinds import module_weight, weight_of
from rankfold.network.passes import Inputs, output_of, run
from rankfold.plan import LayerSpec
from rankfold.progress import Progress, silent
from rankfold.search.curves import Curve, FloatArray
from rankfold.search.network_objectives import Divergence, class_axis
from rankfold.search.units import Width

TRIAL = 0.05
"""Squared relative error that is made, about."""
POWER = 1.5
"""To what power prices times errors are summed (benchmarks/units.py)."""
LEAST = 1e-3
"""Smallest price, as a share of the median."""


@dataclass(frozen=True)
class Trial:
    """An error of known size: weights by parameter name."""

    weights: Mapping[str, Tensor]
    error: float


def priced(
    model: nn.Module,
    curves: Sequence[Curve],
    widths: Sequence[Width],
    moments: Mapping[str, Moment],
    inputs: Sequence[Inputs],
    *,
    progress: Progress = silent,
) -> tuple[tuple[Curve, ...], tuple[Width, ...]]:
    """The curves and widths with prices, from the divergence of the network's outputs on a few inputs."""
    output = output_of(run(model, inputs[0]))
    objective = Divergence(model, inputs, logits=output.ndim > 1 and output.shape[class_axis(output)] > 1)
    specs = {curve.layer.name: curve.layer for curve in curves}
    total = len(curves) + len(widths)
    found: list[float | None] = []
    trials = chain(
        (_of_layer(model, curve, moments) for curve in curves),
        (_of_width(model, width, specs, moments) for width in widths),
    )
    for done, trial in enumerate(trials):
        progress("pricing errors", done, total)
        found.append(None if trial is None else objective.loss_with(dict(trial.weights)) / trial.error)
    progress("pricing errors", total, total)
    found = [price if price is not None and np.isfinite(price) else None for price in found]
    known = [max(price, 0.0) for price in found if price is not None]
    middle = float(np.median(known)) if known else 1.0
    prices = [middle if price is None else max(price, LEAST * middle, 1e-12) for price in found]
    return (
        tuple(replace(curve, price=price) for curve, price in zip(curves, prices, strict=False)),
        tuple(replace(width, price=price) for width, price in zip(widths, prices[len(curves) :], strict=True)),
    )


def _of_layer(model: nn.Module, curve: Curve, moments: Mapping[str, Moment]) -> Trial | None:
    """A layer at a low rank; None where nothing can become of it."""
    if len(curve) < 2 or curve.layer.shape.depthwise or curve.layer.shape.routed:
        return None
    layer, moment = curve.layer, moments.get(curve.layer.name, IDENTITY)
    weight, wiring = weight_of(model.get_submodule(layer.name)), wiring_of("svd", layer.shape)
    expansion = (
        curve.exact if curve.exact is not None and is_matrix(wiring) else expand("svd", weight, layer.shape, moment)
    )
    (grid,) = expansion.grids()
    place = _nearest(grid.errors)
    if place is None:
        return None
    rank = int(grid.ranks[0][place])
    low = reconstruct(expansion.wiring, expansion.factors((rank,))).to(weight)
    return Trial({f"{layer.name}.weight".lstrip("."): module_weight(layer, low)}, float(grid.errors[place]))


def _of_width(
    model: nn.Module, width: Width, specs: Mapping[str, LayerSpec], moments: Mapping[str, Moment]
) -> Trial | None:
    """The layers that read channels, with some of them rebuilt from others."""
    place = _nearest(np.array(width.errors))
    if place is None:
        return None
    kept, weights = width.elimination.kept(width.widths[place]), {}
    for port in width.channels.consumers:
        weight, columns = weight_of(model.get_submodule(port.layer)), entries(kept, port.inner)
        rebuilt = interpolated(weight, moments.get(port.layer, IDENTITY), columns)
        full = padded(rebuilt, weight.shape[2], columns).to(weight)
        weights[f"{port.layer}.weight".lstrip(".")] = module_weight(specs[port.layer], full)
    return Trial(weights, width.errors[place])


def _nearest(errors: FloatArray) -> int | None:
    """The place of the error that is nearest to a trial's; None where all are zero."""
    known = np.flatnonzero(errors > 1e-9)
    return int(known[np.abs(np.log(errors[known] / TRIAL)).argmin()]) if len(known) else None
