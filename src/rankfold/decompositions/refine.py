"""Fitting factors in the metric of what goes into a layer: least E‖(W − Ŵ) x‖² instead of least ‖W − Ŵ‖².

Matrices have a closed form (`weighted`). Everything else is refined by L-BFGS on all factors at once, from what closed
forms or alternating least squares give, in coordinates in which the metric is nearly the identity (`whitening`): along
the inputs it spans orders of magnitude otherwise, and steps that suit the largest do nothing for the rest.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rankfold.decompositions.als import balance, reconstruct
from rankfold.decompositions.expansion import Factors
from rankfold.decompositions.metric import Moment
from rankfold.decompositions.weighted import WeightedExpansion, is_matrix
from rankfold.decompositions.whitening import Whitening
from rankfold.decompositions.wiring import Wiring

_CHUNK = 2**24
"""Entries of the weight that an error is measured on at a time."""
_EXACT = 2**31
"""MACs of a product with the moment up to which it is taken in float64, beyond in float32."""
STEPS = 60
"""Steps of L-BFGS, at most."""


def metric_error(weight: Float[Tensor, "g o i *taps"], wiring: Wiring, factors: Factors, moment: Moment) -> float:
    """Squared relative error in the metric, E‖(W − Ŵ) x‖² / E‖W x‖²; zero where the layer's output is always zero.

    In float64, but for large weights (`_EXACT`): some outputs at a time, in float32, which is as good for these errors.
    """
    dtype = torch.float32 if _is_large(weight) else torch.float64
    error = energy = 0.0
    axis, step = 1 + wiring.factors[-1].index("o"), max(1, _CHUNK // max(weight[0, 0].numel() * len(weight), 1))
    for start in range(0, weight.shape[1], step):
        part = weight[:, start : start + step].to(dtype)
        last = factors[-1].narrow(axis, start, part.shape[1])
        rebuilt = reconstruct(wiring, tuple(factor.to(dtype) for factor in (*factors[:-1], last)))
        error += float(moment.energy(part - rebuilt))
        energy += float(moment.energy(part))
    return max(error, 0.0) / max(energy, 1e-300) if error > 0 else 0.0


def refine(
    weight: Float64[Tensor, "g o i *taps"],
    wiring: Wiring,
    factors: Factors,
    moment: Moment,
    *,
    steps: int = STEPS,
    whitening: Whitening | None = None,
) -> Factors:
    """The factors fitted in the metric, starting from `factors`; never worse there than they are.

    `whitening` is that of the moment on the weight, where it is at hand.
    """
    scale = float(moment.energy(weight))
    if scale <= 0 or steps == 0:
        return factors
    if is_matrix(wiring):
        found = WeightedExpansion(weight, wiring, moment).factors(
            (min(factors[1].shape[-1], *weight.flatten(2).shape[1:]),)
        )
    else:
        whitening = whitening or Whitening.of(moment, weight)
        found = _whitely(weight, wiring, factors, moment, whitening, scale=scale, steps=steps)
    if found[-1].shape != factors[-1].shape:
        return factors  # more components than are of any use
    better = metric_error(weight, wiring, found, moment) <= metric_error(weight, wiring, factors, moment)
    return balance(wiring, found) if better else factors


def _is_large(weight: Tensor) -> bool:
    return weight.numel() * weight[0, 0].numel() > _EXACT


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

    dtype = torch.float32 if _is_large(weight) else weight.dtype
    narrow = moment if moment.joint is None else replace(moment, joint=moment.joint.to(dtype))

    def closure() -> Tensor:
        optimiser.zero_grad()
        residual = weight - reconstruct(wiring, tuple(variables))
        with torch.no_grad():  # the one product with the moment gives the loss and, as that is symmetric, its gradient
            pull = narrow.applied(residual.to(dtype)).to(weight.dtype)
            loss = (pull * residual).sum() / scale
        residual.backward(pull * (2 / scale))
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    found = tuple(variable.detach() for variable in variables)
    return found if all(bool(one.isfinite().all()) for one in found) else factors
