"""Fitting factors in the metric of what goes into a layer: least E‖(W − Ŵ) x‖² instead of least ‖W − Ŵ‖².

Where the second factor is all that holds the outputs, and the first all that holds the inputs, the best factors are
known: with U the leading eigenvectors of W Σ Wᵀ, Ŵ = U Uᵀ W. (Minimise ‖(W − Ŵ) Σ^½‖ over Ŵ of rank r: Eckart and Young
give U Uᵀ W Σ^½, and that is reached. No inverse of Σ is taken, so it may be singular.) Everything else is refined by
L-BFGS on all factors at once, from the closed form or alternating least squares in the Frobenius norm.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from rankfold.decompositions.als import balance, reconstruct
from rankfold.decompositions.expansion import Factors
from rankfold.decompositions.metric import Moment
from rankfold.decompositions.wiring import Wiring

STEPS = 120
"""Steps of L-BFGS, at most."""


def metric_error(weight: Float64[Tensor, "g o i *taps"], wiring: Wiring, factors: Factors, moment: Moment) -> float:
    """Squared relative error in the metric, E‖(W − Ŵ) x‖² / E‖W x‖²; zero where the layer's output is always zero."""
    error = float(moment.energy(weight - reconstruct(wiring, factors)))
    return max(error, 0.0) / max(float(moment.energy(weight)), 1e-300) if error > 0 else 0.0


def refine(
    weight: Float64[Tensor, "g o i *taps"], wiring: Wiring, factors: Factors, moment: Moment, *, steps: int = STEPS
) -> Factors:
    """The factors fitted in the metric, starting from `factors`; never worse there than they are."""
    scale = float(moment.energy(weight))
    if scale <= 0 or steps == 0:
        return factors
    found = _projected(weight, wiring, factors, moment) if _is_matrix(wiring) else None
    found = found or _descended(weight, wiring, factors, moment, scale=scale, steps=steps)
    better = metric_error(weight, wiring, found, moment) <= metric_error(weight, wiring, factors, moment)
    return balance(wiring, found) if better else factors


def _is_matrix(wiring: Wiring) -> bool:
    """Whether the wiring is a matrix of outputs by everything else."""
    return len(wiring.factors) == 2 and wiring.factors[1] == "oA"


def _projected(weight: Tensor, wiring: Wiring, factors: Factors, moment: Moment) -> Factors:
    """U Uᵀ W of this module's head, as two factors."""
    rank = factors[1].shape[-1]
    matrix = weight.flatten(2)
    _, basis = torch.linalg.eigh(moment.applied(weight).flatten(2) @ matrix.mT)
    leading = basis.flip(-1)[..., :rank]
    rows = (leading.mT @ matrix).reshape(len(weight), leading.shape[-1], *weight.shape[2:])
    order = ["A", "i", *(axis for axis in wiring.factors[0] if axis not in "Ai")]
    first = rows.permute(0, *(1 + order.index(axis) for axis in wiring.factors[0]))
    short = rank - leading.shape[-1]
    if short:  # more components than outputs: the rest is of no use
        pads = [0, 0] * (first.ndim - 1 - wiring.factors[0].index("A") - 1)
        first = torch.nn.functional.pad(first, [*pads, 0, short])
        leading = torch.nn.functional.pad(leading, (0, short))
    return first, leading


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
        loss = moment.energy(weight - reconstruct(wiring, tuple(variables))) / scale
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    found = tuple(variable.detach() for variable in variables)
    return found if all(bool(one.isfinite().all()) for one in found) else factors
