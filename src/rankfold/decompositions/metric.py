"""The metric: what makes an error of a layer's weight the error of its output.

Over the input patches x a layer sees, E‖(W − Ŵ) x‖² is tr (W − Ŵ) Σ (W − Ŵ)ᵀ with Σ = E[x xᵀ]. Where outputs do not
count alike it is tr H (W − Ŵ) Σ (W − Ŵ)ᵀ, with H their metric. `calibration` measures Σ, and H.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

LEAST = 1e-9
"""Smallest eigenvalue of the metric of outputs, as a share of the largest."""


@dataclass(frozen=True)
class Moment:
    """The second moment of a layer's patches, per group: E[x xᵀ], x in the order (inputs, taps).

    Whole where `joint` is set, shape (g, n, n), in float32 where it is large. Where that would be too large, it is
    taken to be the Kronecker product of that of the inputs (g, i, i), the mean over taps, and that of the taps (g,
    t, t), the mean over inputs, divided by the mean square; or, where there are no taps, it is rowsᵀ rows + ridge ·
    1 with a few `rows` (g, k, n), patches or a sketch of them. Without any of them it is the identity. `positions`
    is how many patches were seen; `mean` is E[x], where it is kept. `outputs` is H, where outputs do not count alike.
    """

    joint: Float[Tensor, "g n n"] | None = None
    inputs: Float64[Tensor, "g i i"] | None = None
    taps: Float64[Tensor, "g t t"] | None = None
    rows: Float[Tensor, "g k n"] | None = None
    ridge: float = 0.0
    positions: int = 0
    mean: Float64[Tensor, "g n"] | None = None
    outputs: Float[Tensor, "g o o"] | None = None

    def centred(self) -> Moment:
        """The moment about the mean, where it is known: what counts where a bias can take the mean."""
        if self.joint is None or self.mean is None:
            return self
        mean = self.mean.to(self.joint)
        return replace(self, joint=self.joint - mean[:, :, None] * mean[:, None, :])

    def of_groups(self, chosen: Int64[Tensor, " kept"]) -> Moment:
        """The moment of some groups."""
        held = (self.joint, self.inputs, self.taps, self.rows)
        joint, inputs, taps, rows = (None if one is None else one[chosen] for one in held)
        mean = None if self.mean is None else self.mean[chosen]
        return replace(self, joint=joint, inputs=inputs, taps=taps, rows=rows, mean=mean)

    def of_inputs(self, chosen: Int64[Tensor, "g kept"], taps: int) -> Moment:
        """The moment of some inputs of every group, with all their taps."""
        places = (chosen[..., None] * taps + torch.arange(taps)).flatten(1)
        if self.joint is not None:
            joint = torch.stack([self.joint[group][one][:, one] for group, one in enumerate(places)])
            return replace(
                self, joint=joint, mean=None if self.mean is None else self.mean.gather(1, places.to(self.mean.device))
            )
        if self.rows is not None:
            return replace(self, rows=torch.stack([self.rows[group][:, one] for group, one in enumerate(places)]))
        if self.inputs is not None:
            return replace(self, inputs=torch.stack([self.inputs[g][one][:, one] for g, one in enumerate(chosen)]))
        return self

    def of_outputs(self, chosen: Int64[Tensor, "g kept"]) -> Moment:
        """The moment for some outputs of every group."""
        if self.outputs is None:
            return self
        return replace(self, outputs=torch.stack([self.outputs[g][one][:, one] for g, one in enumerate(chosen)]))

    @cached_property
    def root(self) -> tuple[Float64[Tensor, "g o o"], Float64[Tensor, "g o o"]] | None:
        """The symmetric root of H, and its inverse; None where outputs count alike."""
        if self.outputs is None:
            return None
        values, vectors = torch.linalg.eigh(self.outputs.double())
        values = values.clamp_min(LEAST * values[..., -1:]).sqrt()[..., None, :]
        return (vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT

    def counted(self, weight: Float[Tensor, "g o i *taps"]) -> Tensor:
        """H^½ W: a weight like this one of which all outputs count alike."""
        return weight if self.root is None else (self.root[0].to(weight) @ weight.flatten(2)).reshape(weight.shape)

    def shrinkage(self) -> float:
        """How far a whole moment is from being known, from 0 to 1: the share of the identity to mix with it.

        Oracle approximating shrinkage (Chen et al., arXiv 0907.4698, equation 23): with few patches the moment is a
        poor guide to inputs it was not measured on, and with fewer than dimensions it holds some for impossible.
        """
        if (self.joint is None and self.rows is None) or self.positions == 0:
            return 0.0
        if self.joint is not None:
            size, inner = self.joint.shape[-1], self.joint
        else:
            rows = cast(Tensor, self.rows)
            size, inner = rows.shape[-1], (rows @ rows.mT).double()
        trace = inner.diagonal(dim1=-2, dim2=-1).sum(-1)
        square, whole = float(inner.square().sum((-2, -1)).mean()), float(trace.square().mean())
        spread = (self.positions + 1 - 2 / size) * (square - whole / size)
        return min(1.0, ((1 - 2 / size) * square + whole) / spread) if spread > 0 else 1.0

    def shrunk(self) -> Moment:
        """The moment with its share of the identity, of the same trace."""
        if self.rows is not None:
            share, size = self.shrinkage(), self.rows.shape[-1]
            square = float(self.rows.square().sum((-2, -1), dtype=torch.float64).mean()) / size
            return replace(self, rows=(1 - share) ** 0.5 * self.rows, ridge=share * square)
        if self.joint is None:
            return self
        share, size = self.shrinkage(), self.joint.shape[-1]
        mean = self.joint.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        about = None if self.mean is None else (1 - share) ** 0.5 * self.mean
        mixed = (1 - share) * self.joint
        mixed.diagonal(dim1=-2, dim2=-1).add_(share * mean)
        return replace(self, joint=mixed, mean=about)

    def applied(self, residual: Float[Tensor, "g o i *taps"]) -> Tensor:
        """H times the residual times Σ, in the residual's shape, dtype and place."""
        if self.outputs is not None:
            residual = (self.outputs.to(residual) @ residual.flatten(2)).reshape(residual.shape)
        if self.joint is None and self.inputs is None and self.rows is None:
            return residual
        if self.rows is not None:
            rows = self.rows.to(residual)
            return ((residual.flatten(2) @ rows.mT) @ rows).reshape(residual.shape) + self.ridge * residual
        if self.joint is not None:
            return (residual.flatten(2) @ self.joint.to(residual)).reshape(residual.shape)
        inputs, taps = cast(Tensor, self.inputs).to(residual), cast(Tensor, self.taps).to(residual)
        unfolded = residual.flatten(3) if residual.ndim > 3 else residual[..., None]
        return torch.einsum("goit,gij,gts->gojs", unfolded, inputs, taps).reshape(residual.shape)

    def outer(self, weight: Float[Tensor, "g o i *taps"]) -> Float64[Tensor, "g o o"]:
        """W Σ Wᵀ, as if outputs counted alike."""
        if self.outputs is not None:
            return replace(self, outputs=None).outer(weight)
        flat = weight.flatten(2)
        if self.rows is not None:
            seen = flat @ self.rows.to(flat).mT
            return (seen @ seen.mT).double() + self.ridge * (flat @ flat.mT).double()
        exact = weight.double()
        return self.applied(exact).flatten(2) @ exact.flatten(2).mT

    def energy(self, residual: Float[Tensor, "g o i *taps"]) -> Tensor:
        """E‖H^½ R x‖², summed over groups and outputs: a number, differentiable in the residual."""
        return (self.applied(residual) * residual).sum()


IDENTITY = Moment()
"""The metric of a layer whose inputs are not known: the Frobenius norm."""
