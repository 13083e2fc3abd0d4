"""Tucker-2: a 1×1 convolution to A channels, a k×k one from A to B, a 1×1 one back to the outputs.

Kim et al., arXiv 1511.06530. The closed form is the truncated higher-order SVD (De Lathauwer et al., SIAM J. Matrix
Anal. Appl. 21, 2000) over outputs and inputs; its error at every pair of ranks is a sum over the core it leaves out.

It is left as it is: alternating least squares (HOOI) lowers the weight's error by three percent, and more often than
not the accuracy of the network too (benchmarks/tucker_choices.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from rankfold.decompositions.expansion import Decomposition, Expansion, Factors, Grid, discarded, leading_basis, unfold
from rankfold.decompositions.wiring import TAPS, Wiring


class TuckerExpansion(Expansion):
    """Bases of the input and output modes, and the full core in them."""

    def __init__(self, weight: Float64[Tensor, "g o i *taps"], wiring: Wiring, precise: bool) -> None:
        self.wiring = wiring
        axes = "oi" + "".join(axis for axis in TAPS if axis in wiring.factors[1])
        _, self._inputs = leading_basis(unfold(weight, axes, "i"), precise)
        _, self._outputs = leading_basis(unfold(weight, axes, "o"), precise)
        core = torch.einsum("goi...,goB->gBi...", weight, self._outputs)
        self._core = torch.einsum("gBi...,giA->gBA...", core, self._inputs)
        self._total = float(weight.square().sum())

    def grids(self) -> tuple[Grid, ...]:
        energy = self._core.square().flatten(3).sum((0, 3)).T
        errors = discarded(energy) / max(self._total, 1e-300)
        ranks = tuple(np.arange(1, size + 1) for size in errors.shape)
        return (Grid(ranks, np.minimum(errors, 1.0)),)

    def max_ranks(self) -> tuple[int, ...]:
        return self._inputs.shape[-1], self._outputs.shape[-1]

    def factors(self, ranks: Sequence[int]) -> Factors:
        a, b = ranks
        return self._inputs[..., :a].mT, self._core[:, :b, :a], self._outputs[..., :b]


TUCKER = Decomposition(
    name="tucker",
    wiring=lambda taps: Wiring(("Ai", f"BA{taps}", "oB")),
    expand=TuckerExpansion,
    balanced=True,
)
