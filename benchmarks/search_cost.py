"""Time and memory of the search against the number of candidates, of layers, and the layers' width up to 8192.

Synthetic curves for candidates and layers; square Linear layers of random weights for the width, each in a process of
its own for its peak memory. Exponents are fitted on a double logarithmic scale over the upper half of each range.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import tracemalloc
from typing import Any

import numpy as np
import torch
from common import record, write

from rankfold import Cost
from rankfold.decompositions.wiring import Call, LayerShape
from rankfold.plan import LayerSpec
from rankfold.search import Problem, Rene
from rankfold.search.candidates import measure_layer
from rankfold.search.curves import Curve

WIDTHS = (512, 1024, 2048, 4096, 8192)


def synthetic(layers: int, candidates: int) -> Problem:
    """Curves of exponentially falling errors."""
    rng = np.random.default_rng(0)
    curves = []
    for index in range(layers):
        spec = LayerSpec(f"{index}", "Linear", LayerShape(4096, 4096, calls=(Call(1),)), "float32", 4, (4096, 4096))
        share = np.append(1.0, np.sort(rng.uniform(0.01, 0.99, candidates))[::-1])
        costs = {unit: (share * 4096**2).astype(np.int64) for unit in ("params", "macs", "bytes")}
        errors = np.append(0.0, np.exp(-rng.uniform(2, 6) * share[1:]))
        methods = (None, *["svd"] * candidates)
        curves.append(Curve(spec, ("svd",), methods, ((), *[(1,)] * candidates), errors, costs, errors))
    total = layers * 4096**2
    return Problem(tuple(curves), {"macs": total // 2}, Cost(0, 0, 0), Cost(total, total, 4 * total))


def searching(layers: int, candidates: int) -> dict[str, float]:
    """Median seconds of three searches, and the peak of what another one allocates."""
    problem = synthetic(layers, candidates)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        Rene()(problem)
        times.append(time.perf_counter() - start)
    tracemalloc.start()
    Rene()(problem)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"seconds": float(np.median(times)), "peak_gib": peak / 2**30}


def wide(width: int) -> dict[str, float]:
    """Seconds and peak memory of one square layer's curve."""
    spec = LayerSpec("0", "Linear", LayerShape(width, width, calls=(Call(1),)), "float32", 4, (width, width))
    weight = torch.randn(1, width, width, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    measure_layer(spec, weight, ("svd",))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """The slope of log value over log size, on the upper half of the sizes."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def add(records: list[dict[str, Any]], label: str, sizes: tuple[int, ...], found: list[dict[str, float]]) -> None:
    """Adds a series to the records, with the exponents of its time and memory."""
    exponents = {f"exponent_of_{key}": exponent(sizes, [one[key] for one in found]) for key in ("seconds", "peak_gib")}
    for size, one in zip(sizes, found, strict=True):
        records.append(record(against=label, size=size, **one, **exponents))
        print(records[-1], flush=True)


def main() -> None:
    """Three series with their exponents, and what they say of a network of seven billion parameters."""
    if len(sys.argv) > 1:
        print(json.dumps(wide(int(sys.argv[1]))))
        return
    records: list[dict[str, Any]] = []
    series = {
        "candidates per layer (32 layers)": ((64, 256, 1024, 4096), lambda n: searching(32, n)),
        "layers (256 candidates each)": ((8, 32, 128, 512), lambda n: searching(n, 256)),
    }
    for label, (sizes, measured) in series.items():
        add(records, label, sizes, [measured(size) for size in sizes])
    found = []
    for width in WIDTHS:
        done = subprocess.run([sys.executable, __file__, str(width)], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
        print(width, found[-1], flush=True)
    add(records, "width of a square Linear layer: its error curve", WIDTHS, found)
    times = [one["seconds"] for one in found]
    at_4096 = times[WIDTHS.index(4096)]
    # 32 blocks of four 4096×4096 and three 4096×11008 matrices; a Gram matrix is of the smaller side
    products = 32 * (4 * at_4096 + 3 * at_4096 * (1 + 0.5 * (11008 / 4096 - 1)))
    seconds = products + searching(224, 512)["seconds"]
    label = "extrapolated, not measured: a transformer of 7e9 parameters, 224 matrices of 4096×4096 and 4096×11008"
    records.append(record(against=label, size=7_000_000_000, seconds=seconds, peak_gib=found[3]["peak_gib"]))
    write(records)


if __name__ == "__main__":
    main()
