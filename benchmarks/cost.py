"""How time and memory of a calibrated compression grow: with width, layers, taps, images and tokens.

A row of layers of one kind, with ReLU between them, is compressed to half its MACs; one of its sizes changes at a time,
each size in a process of its own. The exponent is the slope of the least-squares line through the logarithms of sizes
and seconds (or of memory beyond that of a process that has the network and the inputs), over the upper half of the
sizes, where fixed costs are small. `--only KIND:AXIS` runs some rows.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from common import keep, parser, record
from torch import nn

from rankfold import Budget, compress

KINDS: dict[str, dict[str, Any]] = {
    "linear, svd": {"decomposition": "svd", "width": 512, "layers": 4, "taps": 1, "inputs": 64, "positions": 64},
    "conv, tucker": {"decomposition": "tucker", "width": 128, "layers": 4, "taps": 3, "inputs": 32, "positions": 196},
    "conv, cp3": {"decomposition": "cp3", "width": 128, "layers": 4, "taps": 3, "inputs": 32, "positions": 196},
    "conv, channels": {
        "decomposition": "interpolative", "width": 128, "layers": 4, "taps": 3, "inputs": 32, "positions": 196
    },
}  # fmt: skip
"""Rows of layers: `width` channels, `taps` along each of two axes, `inputs` to calibrate on with `positions` each."""
SIZES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "linear, svd": {
        "width": (256, 512, 1024, 2048),
        "layers": (2, 4, 8, 16),
        "inputs": (64, 128, 256, 512),
        "positions": (64, 128, 256, 512),
    },
    **{
        kind: {
            "width": (64, 128, 256, 512),
            "layers": (2, 4, 8, 16),
            "taps": (1, 3, 5, 7),
            "inputs": (16, 32, 64, 128),
            "positions": (49, 196, 784, 3136),
        }
        for kind in ("conv, tucker", "conv, cp3", "conv, channels")
    },
}


def row(width: int, layers: int, taps: int, *, linear: bool) -> nn.Module:
    """Layers of one kind with ReLU between them."""
    made: list[nn.Module] = []
    for _ in range(layers):
        layer = nn.Linear(width, width) if linear else nn.Conv2d(width, width, taps, padding=taps // 2)
        made += [layer, nn.ReLU()]
    return nn.Sequential(*made)


def measured(kind: str, sizes: dict[str, int]) -> dict[str, float]:
    """Seconds and gigabytes of one compression; in a process of its own."""
    torch.manual_seed(0)
    options = {**KINDS[kind], **sizes}
    linear, width = kind.startswith("linear"), options["width"]
    model = row(width, options["layers"], options["taps"], linear=linear).eval()
    side = round(options["positions"] ** 0.5)
    shape = (options["positions"], width) if linear else (width, side, side)
    batches = [torch.randn(min(16, options["inputs"]), *shape) for _ in range(0, options["inputs"], 16)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    compress(
        model,
        batches[0][:1],
        decomposition=str(options["decomposition"]),
        budget=Budget(macs=0.5),
        calibration=batches,
    )
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "gigabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20}


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """The slope of the line through the logarithms of the upper half of some sizes and values."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(np.maximum(values[half:], 1e-3)), 1)[0])


def main() -> None:
    """Writes a record of every row and axis."""
    made = parser(__doc__ or "")
    made.add_argument("--only", action="append", help="KIND:AXIS (repeatable)")
    made.add_argument("--one", help="one measurement, printed: a kind and its sizes in JSON")
    arguments = made.parse_args()
    if arguments.one:
        kind, sizes = json.loads(arguments.one)
        print(json.dumps(measured(kind, sizes)))
        return
    for kind, axes in SIZES.items():
        for axis, sizes in axes.items():
            case = f"{kind}:{axis}"
            if arguments.only and case not in arguments.only:
                continue
            found = []
            for size in sizes:
                command = [sys.executable, __file__, "--one", json.dumps([kind, {axis: size}])]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
            seconds, memory = ([one[name] for one in found] for name in ("seconds", "gigabytes"))
            keep(
                [
                    record(
                        case=case,
                        kind=kind,
                        axis=axis,
                        sizes=list(sizes),
                        seconds=[round(one, 2) for one in seconds],
                        gigabytes=[round(one, 3) for one in memory],
                        exponent_of_time=round(exponent(sizes, seconds), 2),
                        exponent_of_memory=round(exponent(sizes, memory), 2),
                    )
                ]
            )


if __name__ == "__main__":
    main()
