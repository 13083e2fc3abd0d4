"""RENE as published against the budgeted form, on ResNet-20's real weights: objective, ranks, accuracy, time, memory.

18 block convolutions, `tucker` (the paper's TT, ranks tied) and `cp3` (its CP); 9,980 test images, no fine-tuning. The
budgeted form gets the MACs that the published one ended with. Every run is a process of its own, for its peak memory.
The validation loss is cross-entropy on batches of 128 labelled training images; the budgeted form never sees data.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from common import network, parser, record, require_data, write

from rankfold import Budget, SearchError, compress
from rankfold.evaluation import accuracy
from rankfold.objectives import Validation
from rankfold.search import Search
from rankfold.search.published import Published

LAYERS = ["layer*"]


def run(arguments: Any) -> dict[str, Any]:
    """One compression in this process."""
    folder = require_data(arguments)
    source, dataset = network(folder, "cifar10_resnet20", "cifar10_resnet20", "cifar10/test.npz")
    example = torch.zeros(1, 3, 32, 32)
    method: str | Search = "rene"
    if arguments.method != "rene":
        options: dict[str, Any] = {"clip": 5.0 if "clipped" in arguments.method else None}
        if "validation" in arguments.method:
            _, train = network(folder, "cifar10_resnet20", "cifar10_resnet20", "cifar10/train.npz")
            labelled = train.sample(12_800)
            batches = [labelled.batch(k, k + 128) for k in range(0, 12_800, 128)]
            options["objective"] = Validation(source.model, batches, together=False)
        method = Published(**options)
    start = time.perf_counter()
    try:
        result = compress(
            source.model,
            example,
            decomposition=arguments.decomposition,
            budget=Budget(macs=arguments.macs),
            calibration="none",
            search=method,
            include=LAYERS,
        )
    except SearchError as error:
        return {"failed": str(error), "seconds": round(time.perf_counter() - start, 1)}
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    kept = result.after.kept(result.before)
    steps = result.trace.steps if result.trace else ()
    joint = [step for step in steps if step.stage == 0]
    return {
        "objective": sum(layer.error for layer in result.plan.layers),
        "macs_kept": kept["macs"],
        "params_kept": kept["params"],
        "top1": round(accuracy(result.model, dataset).top1, 2),
        "seconds": round(seconds, 2),
        "peak_gib": round(peak, 2),
        "ranks_found": [one.split(" ", 1)[1] for one in steps[-1].likeliest if " " in one],
        "kept_dense": sum(layer.decomposition is None for layer in result.plan.layers),
        "first_stage_entropy_over_uniform": [
            round(value, 3) for value in _relative_entropy(joint[0].entropy, joint[-1].entropy)
        ],
    }


def _relative_entropy(first: tuple[float, ...], last: tuple[float, ...]) -> list[float]:
    """Each layer's entropy at the end of a stage over that at its start."""
    return [b / a if a else 0.0 for a, b in zip(first, last, strict=True)]


def main() -> None:
    """Every combination in its own process."""
    made = parser(__doc__ or "")
    made.add_argument("--method")
    made.add_argument("--decomposition")
    made.add_argument("--macs", type=float, default=1.0)
    arguments = made.parse_args()
    if arguments.method:
        print(json.dumps(run(arguments)))
        return
    folder = require_data(arguments)
    source, dataset = network(folder, "cifar10_resnet20", "cifar10_resnet20", "cifar10/test.npz")
    base = accuracy(source.model, dataset)
    records = []
    for name in ("tucker", "cp3"):
        for method in ("published", "published, clipped", "published, clipped, validation loss"):
            one = _apart(name, method, 1.0, folder)
            pairs = [(method, one)]
            if "failed" not in one:
                pairs.append((f"rene at the MACs of: {method}", _apart(name, "rene", one["macs_kept"], folder)))
            for label, values in pairs:
                common = {"decomposition": name, "method": label, "data": "CIFAR-10 test"}
                records.append(record(**common, examples=base.examples, base=round(base.top1, 2), **values))
                print(records[-1], flush=True)
    write(records)


def _apart(name: str, method: str, macs: float, folder: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--data", str(folder), "--method", method, "--decomposition", name]
    done = subprocess.run([*command, "--macs", repr(macs)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
