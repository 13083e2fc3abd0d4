"""Wall time and peak memory of compression, each case in a process of its own; model building is not counted.

ResNet-18 (random weights, 224×224) and VGG-16 (CIFAR-10) to half the MACs with Tucker; CP of ResNet-20's 18
convolutions between first and last; CP of one 512→512 3×3×3 convolution at half its parameters.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import network, parser, record, require_data, write

from rankfold import Budget, compress
from rankfold.decompositions import expand, fit, relative_error
from rankfold.decompositions.wiring import LayerShape
from rankfold.sources.models import build_model

CASES = ("resnet18 tucker", "vgg16 tucker", "resnet20 cp", "resnet20 cp3", "conv3d cp")


def run(case: str, folder: Path) -> dict[str, Any]:
    """One case: seconds, peak memory in GB, and what came out."""
    name, decomposition = case.split()
    if name == "conv3d":
        torch.manual_seed(0)
        weight, shape = torch.randn(1, 512, 512, 3, 3, 3), LayerShape(512, 512, (3, 3, 3))
        rank = weight.numel() // 2 // (512 + 512 + 9)
        start = time.perf_counter()
        expansion = expand("cp", weight, shape)
        factors = fit("cp", weight, shape, (rank,), expansion=expansion)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        return {
            "seconds": seconds,
            "peak_gb": peak,
            "rank": rank,
            "error": relative_error(weight.double(), expansion.wiring, factors),
        }
    exclude: tuple[str, ...] = ()
    if name == "resnet20":
        model = network(folder, "cifar10_resnet20", "cifar10_resnet20", "cifar10/test.npz")[0].model
        exclude = ("conv1", "linear")
    else:
        model = build_model("zoo:resnet18" if name == "resnet18" else "zoo:cifar10_vgg16").model
    example = torch.zeros(1, 3, *((224, 224) if name == "resnet18" else (32, 32)))
    result = compress(
        model, example, decomposition=decomposition, budget=Budget(macs=0.5), exclude=exclude, calibration="none"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    kept = result.after.kept(result.before)
    return {
        "seconds": result.seconds,
        "peak_gb": peak,
        "macs_kept": kept["macs"],
        "params_kept": kept["params"],
        "layers": len(result.plan.layers),
    }


def main() -> None:
    """Runs each case three times in new processes (the long one once) and records the median."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--case", choices=CASES, help="run this case alone, in this process")
    given = arguments.parse_args()
    folder = require_data(given)
    if given.case:
        print(json.dumps(run(given.case, folder)))
        return
    records = []
    for case in CASES:
        command = [sys.executable, __file__, "--data", str(folder), "--case", case]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(1 if case.startswith("conv3d") else 3)
        ]
        runs.sort(key=lambda one: float(one["seconds"]))
        records.append(record(case=case, runs=[round(one["seconds"], 2) for one in runs], **runs[len(runs) // 2]))
    write(records)


if __name__ == "__main__":
    main()
