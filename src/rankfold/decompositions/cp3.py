"""CP with the taps together: a 1×1 convolution to A channels, a depthwise k×k one, and a 1×1 back.

The three-way CP of outputs × inputs × taps, as in Astrid and Lee, arXiv 1701.07148. One depthwise kernel per component
instead of a product of one-dimensional ones costs little more and follows the weight much closer.
"""

from __future__ import annotations

from rankfold.decompositions.cp import CpExpansion
from rankfold.decompositions.expansion import Decomposition
from rankfold.decompositions.wiring import Wiring

CP3 = Decomposition(
    name="cp3",
    wiring=lambda taps: Wiring(("Ai", f"A{taps}", "oA")),
    expand=CpExpansion,
    sweeps=80,
    knots=3,
    family=lambda ranks: "cp3",
)
