"""A weight of known rank plus noise: how often its rank is found, by the search as published, with a budget, by EVBMF.

A 20×16×3×3 weight from standard normal factors of ranks 3 to 9 (of several bonds in proportion), noise at 40, 30 and 20
dB below it, 20 seeds, which also draw the published search's logits. The budgeted search gets an error limit of 1.1
times the noise's share. The published one gets candidates 2, 5, … 20, then steps of one.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from common import record, write

from rankfold import Budget, Cost, SearchError
from rankfold.decompositions import DECOMPOSITIONS, reconstruct, wiring_of
from rankfold.decompositions.wiring import Call, LayerShape
from rankfold.plan import LayerSpec
from rankfold.planning import pose
from rankfold.search import Rene, settle
from rankfold.search.candidates import measure_layer
from rankfold.search.evbmf import evbmf_ranks
from rankfold.search.published import Published, Schedule

SHAPE = LayerShape(20, 16, (3, 3), calls=(Call(1, (16, 16), (16, 16)),))
LAYER = LayerSpec("conv", "Conv2d", SHAPE, "float64", 8, (20, 16, 3, 3))
SEEDS = 20


def planted(name: str, seed: int, decibels: int) -> tuple[tuple[int, ...], torch.Tensor]:
    """Ranks, and a weight that has them but for the noise."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    rank = int(rng.integers(3, 10))
    half = rank // 2 + 1
    last = round(rank * SHAPE.outputs / SHAPE.inputs)
    ranks = {
        "tucker": (rank, last),
        "tt": (rank, int(rng.integers(rank, 2 * rank)), last),
        "ring": (2, half, int(rng.integers(half, rank + 1)), round(half * SHAPE.outputs / SHAPE.inputs)),
    }.get(name, (rank,))
    wiring = wiring_of(name, SHAPE)
    sizes = {**SHAPE.sizes, **dict(zip(wiring.bonds, ranks, strict=True))}
    shapes = [wiring.factor_shape(position, sizes) for position in range(len(wiring.factors))]
    factors = tuple(torch.randn(1, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    weight = reconstruct(wiring, factors)
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return ranks, weight + noise * (weight.norm() / noise.norm()) * 10 ** (-decibels / 20)


def published(name: str, weight: torch.Tensor, seed: int) -> tuple[int, ...] | None:
    """The published search's ranks; None where it diverges."""
    curve = measure_layer(LAYER, weight.float(), (name,), units=("params",))
    problem = pose((curve,), Cost(10**9, 10**9, 10**9), Budget(params=1.0))
    try:
        found = Published(schedule=Schedule(2, 20, 3, 3), clip=5.0, seed=seed)(problem)
    except SearchError:
        return None
    assert found.curves is not None
    return found.curves[0].ranks[1]


def budgeted(name: str, weight: torch.Tensor, decibels: int) -> tuple[int, ...]:
    """The ranks of the cheapest plan whose error is within 1.1 times the noise."""
    curve = measure_layer(LAYER, weight, (name,), units=("params",))
    limit = Budget(error=1.1 * 10 ** (-decibels / 10), minimise="params")
    found = settle(pose((curve,), LAYER.dense, limit), Rene())
    assert found.curves is not None
    return found.curves[0].ranks[found.choices[0]]


def main() -> None:
    """Counts, and times, by decomposition and noise."""
    records = []
    for name in DECOMPOSITIONS:
        for decibels in (40, 30, 20):
            found = {"published": 0, "budgeted": 0, "evbmf": 0}
            seconds = dict.fromkeys(found, 0.0)
            for seed in range(SEEDS):
                ranks, weight = planted(name, seed, decibels)
                for method in found:
                    start = time.perf_counter()
                    if method == "published":
                        got = published(name, weight, seed)
                    elif method == "budgeted":
                        got = budgeted(name, weight, decibels)
                    else:
                        got = evbmf_ranks(name, weight, SHAPE)
                    seconds[method] += (time.perf_counter() - start) / SEEDS
                    found[method] += got == ranks
            shares = {f"{method}_found": f"{count} of {SEEDS}" for method, count in found.items()}
            times = {f"{method}_seconds": round(value, 3) for method, value in seconds.items()}
            records.append(record(decomposition=name, decibels=decibels, **shares, **times))
            print(records[-1], flush=True)
    write(records)


if __name__ == "__main__":
    main()
