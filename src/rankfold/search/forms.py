"""Forms: what a layer's candidates cost at the shape that it has between narrower layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankfold.budget import RESOURCES, Cost
from rankfold.decompositions import wiring_of
from rankfold.decompositions.wiring import LayerShape
from rankfold.search.curves import Curve, IntArray


def costs_at(curve: Curve, forms: Sequence[int], shape: LayerShape) -> dict[str, IntArray]:
    """The costs by unit of some of a layer's candidates at a shape; of ranks without use there, the dense layer's."""
    layer = curve.layer
    dense = layer.cost(shape)
    found: dict[str, IntArray] = {unit: np.full(len(forms), getattr(dense, unit)) for unit in RESOURCES}
    places: dict[str, list[int]] = {}
    for place, form in enumerate(forms):
        if (method := curve.methods[form]) is not None:
            places.setdefault(method, []).append(place)
    for method, own in places.items():
        wiring = wiring_of(method, shape)
        ranks = list(np.array([curve.ranks[forms[place]] for place in own], dtype=np.int64).T)
        useful = np.ones(len(own), dtype=np.bool_)
        for rank, largest in zip(ranks, wiring.largest_ranks(shape, ranks), strict=True):
            useful &= rank <= largest
        at, ranks = np.array(own)[useful], [rank[useful] for rank in ranks]
        found["params"][at], found["macs"][at] = wiring.params(shape, ranks), wiring.macs(shape, ranks)
        found["bytes"][at] = found["params"][at] * layer.itemsize
        if layer.times and len(at):
            found["latency"][at] = layer.times(shape, wiring, ranks)
    return found


def cost_at(curve: Curve, form: int, shape: LayerShape) -> Cost:
    """The cost of one of them."""
    return Cost(**{unit: int(cost[0]) for unit, cost in costs_at(curve, [form], shape).items()})
