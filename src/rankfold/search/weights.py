"""The weights that candidates stand for, for objectives that look at weights."""

from __future__ import annotations

from torch import Tensor

from rankfold.decompositions import Expansion, Factors, expand, fit, reconstruct
from rankfold.errors import BudgetError
from rankfold.search.curves import Curve


class Reconstructions:
    """Reconstructed weights of curves' candidates; every weight is expanded once per decomposition.

    Factors that had to be fitted are kept as well.
    """

    def __init__(self) -> None:
        self._expansions: dict[tuple[str, str], Expansion] = {}
        self._fitted: dict[tuple[str, str, tuple[int, ...]], Factors] = {}

    def weight(self, curve: Curve, k: int) -> Tensor:
        """The weight of a candidate, fitted as it would be in the plan, in the dtype of the original."""
        original, method = curve.weight, curve.methods[k]
        if original is None:
            raise BudgetError(
                f"{curve.layer.name}: this objective needs the weights, and the problem has none; "
                "leave out 'interpolative'"
            )
        if method is None:
            return original
        place = (curve.layer.name, method)
        if place not in self._expansions:
            self._expansions[place] = expand(method, original, curve.layer.shape)
        expansion = self._expansions[place]
        fitted = (curve.layer.name, method, curve.ranks[k])
        factors = self._fitted.get(fitted)
        if factors is None:
            factors = fit(method, original, curve.layer.shape, curve.ranks[k], expansion=expansion)
            if curve.family(k):
                self._fitted[fitted] = factors
        return reconstruct(expansion.wiring, factors).to(original.dtype)
