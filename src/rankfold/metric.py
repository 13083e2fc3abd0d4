"""The metric: what makes an error of a layer's weight the error of its output.

Over the input patches x a layer sees, E‖(W − Ŵ) x‖² is tr (W − Ŵ) Σ (W − Ŵ)ᵀ with Σ = E[x xᵀ]. `calibration` measures
Σ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """The second moment of a layer's patches, per group: E[x xᵀ], x in the order (inputs, taps).

    Whole where `joint` is set, shape (g, n, n). Where that would be too large, it is taken to be the Kronecker product
    of that of the inputs (g, i, i), the mean over taps, and that of the taps (g, t, t), the mean over inputs, divided
    by the mean square; without any of them it is the identity. `positions` is how many patches were seen.
    """

    joint: Float64[Tensor, "g n n"] | None = None
    inputs: Float64[Tensor, "g i i"] | None = None
    taps: Float64[Tensor, "g t t"] | None = None
    positions: int = 0

    def applied(self, residual: Float[Tensor, "g o i *taps"]) -> Tensor:
        """The residual times the moment, in the residual's shape, dtype and place."""
        if self.joint is None and self.inputs is None:
            return residual
        if self.joint is not None:
            return (residual.flatten(2) @ self.joint.to(residual)).reshape(residual.shape)
        inputs, taps = cast(Tensor, self.inputs).to(residual), cast(Tensor, self.taps).to(residual)
        unfolded = residual.flatten(3) if residual.ndim > 3 else residual[..., None]
        return torch.einsum("goit,gij,gts->gojs", unfolded, inputs, taps).reshape(residual.shape)

    def energy(self, residual: Float[Tensor, "g o i *taps"]) -> Tensor:
        """E‖R x‖², summed over groups and outputs: a number, differentiable in the residual."""
        return (self.applied(residual) * residual).sum()


IDENTITY = Moment()
"""The metric of a layer whose inputs are not known: the Frobenius norm."""
