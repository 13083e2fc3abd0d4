"""Directories for transformers: every model of its architectures is compressed, saved, loaded by its class and run.

A record each, with the largest difference of its outputs from the compressed model's, relative to the largest output,
or why it was not loaded. `python benchmarks/pretrained.py [NAME ...]`
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import record, write
from zoo_of_architectures import ARCHITECTURES, Architecture

from rankfold import Budget, compress, save_pretrained
from rankfold.network.passes import run, tensors_in


def attempt(one: Architecture, folder: Path) -> dict[str, Any]:
    """What comes of an architecture."""
    try:
        model, inputs = one.build()
        result = compress(model, inputs, decomposition="svd", budget=Budget(params=0.9), calibration="none")
        kind: Any = type(model)
        loaded = kind.from_pretrained(save_pretrained(result, folder / one.name))
        pairs = zip(tensors_in(run(loaded, inputs)), tensors_in(run(result.model, inputs)), strict=True)
        apart = [
            float((own - other).abs().max() / other.abs().max().clamp_min(1e-9))
            for own, other in pairs
            if other.is_floating_point()
        ]
    except Exception as error:
        return {"name": one.name, "result": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    return {"name": one.name, "result": "loaded", "difference": max(apart)}


def main() -> None:
    """All architectures of transformers, or those named."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("names", nargs="*", metavar="NAME")
    names = made.parse_args().names
    chosen = [
        one for one in ARCHITECTURES.values() if one.library == "transformers" and one.name in (names or ARCHITECTURES)
    ]
    with tempfile.TemporaryDirectory() as folder:
        records = [record(**attempt(one, Path(folder))) for one in chosen]
    loaded = [one for one in records if one["result"] == "loaded"]
    print(f"{len(loaded)} of {len(records)} load; largest difference {max(one['difference'] for one in loaded):.1g}")
    for one in records:
        if one["result"] != "loaded":
            print(one["name"], one["result"])
    if not names:
        write(records)


if __name__ == "__main__":
    main()
