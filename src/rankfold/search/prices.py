"""Prices: what errors cost the network, so that those of layers and of channels can be added up.

Relative errors of different layers are no common measure: a classifier that loses a hundredth of its output is not a
first layer that loses a hundredth. Nor do gradients tell (they are those of infinitesimal errors, and overestimate
errors of size that are made everywhere at once tenfold). So it is measured: every part gets errors of about the
`TRIALS`, one at a time, and the divergence of the network's output from the original's is their price. One size is not
enough: outputs of a network that is sure of itself hardly move for long, and then at once. Nor do a few inputs tell the
divergence itself, most of which comes from the rare ones that such a network is in doubt about: at `TEMPERATURE` all
of them have a say (from 32 images, prices of ResNet-20 then err by a factor of 1.8 instead of 2.7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.decompositions import Expansion, expand, is_matrix, reconstruct, wiring_of
from rankfold.decompositions.interpolative import entries, interpolated, padded
from rankfold.decompositions.metric import IDENTITY, Moment
from rankfold.network.kinds import module_weight, weight_of
from rankfold.network.passes import Inputs, examples_in, few, output_of
from rankfold.network.precision import takes_bfloat16
from rankfold.network.replay import Replay
from rankfold.plan import LayerSpec
from rankfold.progress import Progress, silent
from rankfold.search.curves import Curve, FloatArray, Price
from rankfold.search.network_objectives import class_axis, over_classes, rows_of
from rankfold.search.widths import Width
from rankfold.sharing import everywhere, owned

TRIALS = (0.02, 0.1, 0.5)
"""Squared relative errors that are made, about."""
TEMPERATURE = 2.0
"""Of the outputs' distributions that are compared."""
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
    classes: bool = True,
    progress: Progress = silent,
) -> tuple[tuple[Curve, ...], tuple[Width, ...]]:
    """The curves and widths with prices, from the divergence of the network's outputs on a few inputs.

    With `classes` these are distributions over classes, where they have more than one. Passes may be in bfloat16, which
    changes prices by 0.4 to 5 %; half of the inputs change them by 9 to 53 % (ResNet-20, DeiT-Tiny).
    """
    specs = {curve.layer.name: curve.layer for curve in curves}
    parts: list[Callable[[], Iterator[Trial]]] = [
        *(partial(_of_layer, model, curve, _matrix(model, curve, moments)) for curve in curves),
        *(partial(_of_width, model, width, specs, moments) for width in widths),
    ]
    sums = [dict[float, float]() for _ in parts]
    sizes = [examples_in(batch) for batch in inputs]
    narrow = all(takes_bfloat16(model, one) for one in few(inputs, 1))
    for number, (batch, size) in enumerate(zip(inputs, sizes, strict=True)):
        replay = Replay(model, batch, narrow=narrow)
        divergence = _divergence_from(output_of(replay.output), classes=classes)
        for done, (part, found) in enumerate(zip(parts, sums, strict=True)):
            progress("pricing errors", number * len(parts) + done, len(inputs) * len(parts))
            if not owned(done):
                continue
            for trial in part():
                loss = divergence(output_of(replay(trial.weights)))
                found[trial.error] = found.get(trial.error, 0.0) + loss * size / sum(sizes)
        del replay, divergence  # what they keep makes room for the next one's
    progress("pricing errors", len(inputs) * len(parts), len(inputs) * len(parts))
    made = everywhere(sums)
    sums = [made[done % len(made)][done] for done in range(len(parts))]
    prices = _prices([{error: loss for error, loss in found.items() if np.isfinite(loss)} for found in sums])
    return (
        tuple(replace(curve, price=price) for curve, price in zip(curves, prices, strict=False)),
        tuple(replace(width, price=price) for width, price in zip(widths, prices[len(curves) :], strict=True)),
    )


def _divergence_from(whole: Tensor, *, classes: bool) -> Callable[[Tensor], float]:
    """What outputs have lost: of distributions over classes the divergence, of others the relative squared error.

    With p the whole network's distribution and d the difference of the logits, both at `TEMPERATURE` T, the divergence
    is log Σ p eᵈ − Σ p d, in which nothing cancels where d is small.
    """
    if not classes or not over_classes(whole):
        whole = whole.float()
        energy = whole.square().sum().clamp_min(1e-30)
        return lambda output: float((output.float() - whole).square().sum() / energy)
    axis = class_axis(whole)
    taught = rows_of(functional.softmax(whole.float() / TEMPERATURE, axis), axis)

    def divergence(output: Tensor) -> float:
        lost = 0.0
        for own, theirs, shares in zip(rows_of(output, axis), rows_of(whole, axis), taught, strict=True):
            apart = (own.float() - theirs.float()).nan_to_num_(0.0, 0.0, -torch.inf) / TEMPERATURE  # of masked classes
            mean = (shares * apart).sum(-1)
            lost += float(((shares * apart.expm1_()).sum(-1).log1p() - mean).sum(dtype=torch.float64))
        return TEMPERATURE**2 * lost / sum(map(len, taught))

    return divergence


def _prices(found: Sequence[Mapping[float, float]]) -> list[Price]:
    """A price for every part, from its losses by error: at least `LEAST` of the median, which those without any get."""
    rates = [loss / error for losses in found for error, loss in losses.items()]
    middle = max(float(np.median(rates)), 1e-12) if rates else 1.0
    return [
        Price(
            tuple(sorted(losses)),
            tuple(max(losses[error], LEAST * middle * error) for error in sorted(losses)),
        )
        if losses
        else Price((1.0,), (middle,))
        for losses in found
    ]


def _matrix(model: nn.Module, curve: Curve, moments: Mapping[str, Moment]) -> Expansion | None:
    """A layer's weight as a matrix in its metric; None where nothing can become of the layer."""
    layer = curve.layer
    if len(curve) < 2 or layer.shape.depthwise or layer.shape.routed:
        return None
    if curve.exact is not None and is_matrix(wiring_of("svd", layer.shape)):
        return curve.exact
    weight = weight_of(model.get_submodule(layer.name))
    return expand("svd", weight, layer.shape, moments.get(layer.name, IDENTITY))


def _of_layer(model: nn.Module, curve: Curve, expansion: Expansion | None) -> Iterator[Trial]:
    """A layer at low ranks of its matrix."""
    if expansion is None:
        return
    layer, (grid,) = curve.layer, expansion.grids()
    weight = weight_of(model.get_submodule(layer.name))
    for place in _nearest(grid.errors):
        rank = int(grid.ranks[0][place])
        factors = tuple(one.to(torch.promote_types(weight.dtype, torch.float32)) for one in expansion.factors((rank,)))
        low = reconstruct(expansion.wiring, factors).to(weight)
        yield Trial({f"{layer.name}.weight".lstrip("."): module_weight(layer, low)}, float(grid.errors[place]))


def _of_width(
    model: nn.Module, width: Width, specs: Mapping[str, LayerSpec], moments: Mapping[str, Moment]
) -> Iterator[Trial]:
    """The layers that read channels, with some of them rebuilt from others."""
    for place in _nearest(np.array(width.errors)):
        kept, weights = width.elimination.kept(width.widths[place]), {}
        for port in width.channels.consumers:
            weight, columns = weight_of(model.get_submodule(port.layer)), entries(kept, port.inner)
            rebuilt = interpolated(weight, moments.get(port.layer, IDENTITY), columns)
            full = padded(rebuilt, weight.shape[2], columns).to(weight)
            weights[f"{port.layer}.weight".lstrip(".")] = module_weight(specs[port.layer], full)
        yield Trial(weights, width.errors[place])


def _nearest(errors: FloatArray) -> list[int]:
    """The places of the errors that are nearest to those of trials; none where all are zero."""
    known = np.flatnonzero(errors > 1e-9)
    return sorted({int(known[np.abs(np.log(errors[known] / trial)).argmin()]) for trial in TRIALS if len(known)})
