"""Spatially separable convolutions: the first half of the taps with the inputs, the other half with the outputs.

A k×k convolution becomes a k×1 and a 1×k one (Jaderberg et al., arXiv 1405.3866, scheme 2; Tai et al., arXiv
1511.06067, give the closed form used here: the truncated SVD of the (inputs, rows) × (columns, outputs) unfolding). A
3-D kernel splits into depth and the two others, as in R(2+1)D (Tran et al., arXiv 1711.11248); a 1-D kernel has
nothing to split, and stays with the inputs as in `svd`.
"""

from __future__ import annotations

from rankfold.decompositions.expansion import Decomposition
from rankfold.decompositions.svd import TwoFactorExpansion
from rankfold.decompositions.wiring import Wiring


def _wiring(taps: str) -> Wiring:
    return Wiring((f"Ai{taps[:1]}", f"o{taps[1:]}A"))


SPATIAL = Decomposition(name="spatial", wiring=_wiring, expand=TwoFactorExpansion)
