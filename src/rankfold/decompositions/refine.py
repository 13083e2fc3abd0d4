"""Fitting factors in the metric of what goes into a layer: least E‖(W − Ŵ) x‖² instead of least ‖W − Ŵ‖².

Matrices have a closed form (`weighted`). Of everything else, which closed forms or alternating least squares begin, the
factors that hold the outputs are solved for (`projected`). Small weights then take a few steps of L-BFGS on all factors
at once, in the coordinates of `whitening`: along the inputs the metric spans orders of magnitude, and steps that suit
the largest do nothing for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rankfold.decompositions.als import balance
from rankfold.decompositions.contractions import reconstruct
from rankfold.decompositions.expansion import Factors
from rankfold.decompositions.metric import Moment
from rankfold.decompositions.projected import projected, projected_loss
from rankfold.decompositions.weighted import WeightedExpansion, is_matrix
from rankfold.decompositions.whitening import Whitening
from rankfold.decompositions.wiring import Wiring

_CHUNK = 2**24
"""Entries of the weight that an error is measured on at a time."""
LARGEST_EXACT = 2**29
"""MACs of a product with the moment up to which it is taken in float64, and steps are; beyond it is in float32.

On weights of 256 × 256 × 3 × 3 ten steps lower the squared error by 1 % (ResNet-50's `layer3.4.conv2`, half the
parameters, `cp3`: from 0.00481 to 0.00476; Tucker: from 0.0192 to 0.0190) and take a third to two thirds of the time.
"""
STEPS, MOST_STEPS = 10, 40
"""Steps of L-BFGS, at most: on large weights, and on small ones.

On weights of 128 × 128 × 3 × 3 sixty gain 1 to 3 % of the error more and take most of the time. On 16 × 16 × 3 × 3 at
small ranks they gain a quarter: with 10, 40 and 120 on every layer ResNet-20 has 84.8, 85.5 and 85.9 % of top-1 at 20 %
of its MACs (`cp3`, 512 images; with `auto` 85.9, 86.4 and 86.4).
"""
WORK_OF_STEPS = 2**29
"""MACs of the products with the moment in all steps of a weight between the two, about."""


def metric_error(
    weight: Float[Tensor, "g o i *taps"],
    wiring: Wiring,
    factors: Factors,
    moment: Moment,
    *,
    energy: float | None = None,
) -> float:
    """Squared relative error in the metric, E‖(W − Ŵ) x‖² / E‖W x‖²; zero where the layer's output is always zero.

    In float64, but for large weights (`LARGEST_EXACT`): in float32, which is as good for these errors. `energy` is
    `energy_of` the weight, where it is known.
    """
    error = _lost(weight, wiring, factors, moment)
    return error / max(energy_of(weight, moment) if energy is None else energy, 1e-300) if error > 0 else 0.0


def reached_error(
    weight: Float[Tensor, "g o i *taps"], wiring: Wiring, factors: Factors, moment: Moment, energy: float
) -> float:
    """The `metric_error` of what `refine` makes of the factors without steps, for less work than making it."""
    exact, lost = weight.double(), None
    if not is_matrix(wiring):
        lost = projected_loss(exact, wiring, factors, moment, dtype=_dtype_of(weight), energy=energy)
    if lost is None:
        return metric_error(weight, wiring, refine(exact, wiring, factors, moment, steps=0), moment, energy=energy)
    return lost / max(energy, 1e-300)


def energy_of(weight: Float[Tensor, "g o i *taps"], moment: Moment) -> float:
    """E‖W x‖², summed over groups and outputs."""
    return sum(float(moment.energy(part)) for _, part in _some_outputs(weight, moment))


def refine(
    weight: Float64[Tensor, "g o i *taps"],
    wiring: Wiring,
    factors: Factors,
    moment: Moment,
    *,
    steps: int | None = None,
    whitening: Whitening | None = None,
) -> Factors:
    """The factors fitted in the metric, starting from `factors`; never worse there than they are.

    The factors next to the outputs are solved for, then all descend by so many `steps`, more on small weights unless
    they are given, but for those of large weights.
    `whitening` is that of the moment on the weight, where it is at hand.
    """
    if is_matrix(wiring):
        largest = min(factors[1].shape[-1], *weight.flatten(2).shape[1:])
        found = WeightedExpansion(weight, wiring, moment).factors((largest,))
    else:
        dtype = _dtype_of(weight)
        found = projected(weight, wiring, factors, moment, dtype=dtype)
        if dtype == torch.float32:
            return balance(wiring, found)
        steps = _steps_of(weight) if steps is None else steps
        if steps and (scale := energy_of(weight, moment)) > 0:
            whitening = whitening or Whitening.of(moment, weight)
            found = _whitely(weight, wiring, found, moment, whitening, scale=scale, steps=steps)
            found = projected(weight, wiring, found, moment, dtype=dtype)
    if found[-1].shape != factors[-1].shape:
        return factors  # more components than are of any use
    better = _lost(weight, wiring, found, moment) <= _lost(weight, wiring, factors, moment)
    return balance(wiring, found) if better else factors


def _lost(weight: Tensor, wiring: Wiring, factors: Factors, moment: Moment) -> float:
    """E‖(W − Ŵ) x‖², summed over groups and outputs."""
    axis, error = 1 + wiring.factors[-1].index("o"), 0.0
    for start, part in _some_outputs(weight, moment):
        last = factors[-1].narrow(axis, start, part.shape[1])
        rebuilt = reconstruct(wiring, tuple(factor.to(part) for factor in (*factors[:-1], last)))
        error += float(moment.energy(part - rebuilt))
    return error


def _some_outputs(weight: Tensor, moment: Moment) -> Iterator[tuple[int, Tensor]]:
    """The weight for some outputs after another, from the first of them on, in the dtype of products.

    For all of them where they have a metric.
    """
    step = max(1, _CHUNK // max(weight[0, 0].numel() * len(weight), 1))
    step = step if moment.outputs is None else weight.shape[1]
    for start in range(0, weight.shape[1], step):
        yield start, weight[:, start : start + step].to(_dtype_of(weight))


def _work_of(weight: Tensor) -> int:
    """The MACs of a product of a weight with its moment."""
    return weight.numel() * weight[0, 0].numel()


def _dtype_of(weight: Tensor) -> torch.dtype:
    """The dtype in which products of a weight with its moment are taken."""
    return torch.float32 if _work_of(weight) > LARGEST_EXACT else torch.float64


def _steps_of(weight: Tensor) -> int:
    """The steps that a weight takes."""
    return max(STEPS, min(MOST_STEPS, WORK_OF_STEPS // _work_of(weight)))


def _whitely(
    weight: Tensor,
    wiring: Wiring,
    factors: Factors,
    moment: Moment,
    whitening: Whitening | None,
    *,
    scale: float,
    steps: int,
) -> Factors:
    """The factors after steps in whitened coordinates, where there are any."""
    if whitening is None:
        return _descended(weight, wiring, factors, moment, scale=scale, steps=steps)
    found = _descended(
        whitening.whitened(weight),
        wiring,
        whitening.whitened_factors(wiring, factors),
        whitening.left_of(moment, weight.shape[2:]),
        scale=scale,
        steps=steps,
    )
    return whitening.unwhitened(wiring, found)


def _descended(
    weight: Tensor, wiring: Wiring, factors: Factors, moment: Moment, *, scale: float, steps: int
) -> Factors:
    """The factors after L-BFGS with a strong-Wolfe line search on the relative error."""
    variables = [
        factor.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        for factor in balance(wiring, factors)
    ]
    optimiser = torch.optim.LBFGS(
        variables, max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-9
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        residual = weight - reconstruct(wiring, tuple(variables))
        with torch.no_grad():  # the one product with the moment gives the loss and, as that is symmetric, its gradient
            pull = moment.applied(residual)
            loss = (pull * residual).sum() / scale
        residual.backward(pull * (2 / scale))
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    found = tuple(variable.detach() for variable in variables)
    return found if all(bool(one.isfinite().all()) for one in found) else factors
