"""The state of a training run in one file: written atomically, read without unpickling anything.

A safetensors file: tensors under dotted names, and everything else as JSON in its header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankfold.errors import TrainingError


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by group and name, and facts in JSON's types."""

    groups: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any]


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint in place of an earlier one, in one step; raises TrainingError where that fails."""
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().contiguous().clone()
        for group, named in checkpoint.groups.items()
        for name, tensor in named.items()
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"facts": json.dumps(checkpoint.facts)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(f"cannot write the checkpoint {path}: {error}; the one before it is still there") from error


def read(path: Path) -> Checkpoint:
    """The checkpoint in a file; raises TrainingError where it is none."""
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            for key in file.keys():  # noqa: SIM118 (it is not a mapping)
                group, _, name = key.partition("/")
                groups.setdefault(group, {})[name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(f"{path} is not a readable checkpoint ({error}); delete it to start anew") from error
    return Checkpoint(groups, facts)


def left(path: Path | None) -> str:
    """What is left of a run, in words."""
    return f"the last checkpoint, {path}, is from before" if path and path.exists() else "no checkpoint"
