"""Checkpoints of searches: one JSON file, replaced atomically, that only the same search of the same problem takes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from rankfold.errors import ArtifactError
from rankfold.search.problem import Problem

FORMAT = "rankfold-search"


def digest_of(problem: Problem, settings: str) -> str:
    """A checksum over everything that decides how a search goes: candidates, costs, errors, limits and settings."""
    hasher = hashlib.sha256(settings.encode())
    hasher.update(repr((problem.limits, problem.fixed, problem.original, problem.error, problem.minimise)).encode())
    for curve in problem.curves:
        hasher.update(repr((curve.layer.name, curve.methods, curve.ranks)).encode())
        hasher.update(curve.closed.tobytes() + curve.errors.tobytes())
        for unit in sorted(curve.costs):
            hasher.update(curve.costs[unit].tobytes())
    return hasher.hexdigest()


def write(path: Path, digest: str, state: dict[str, Any]) -> None:
    """Puts a search's state at `path`, in place of an earlier one. Raises ArtifactError where it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "digest": digest, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ArtifactError(f"the search's checkpoint {path} cannot be written: {error.strerror or error}") from error


def read(path: Path, digest: str) -> dict[str, Any] | None:
    """The state at `path`, None where there is none yet; raises ArtifactError where it is of another search."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"the search's checkpoint {path} cannot be read ({error}); remove it") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not the checkpoint of a search; give another path")
    if content.get("digest") != digest:
        raise ArtifactError(
            f"the checkpoint {path} is of another search (network, budget, decompositions or settings differ); "
            "remove it, or give another path"
        )
    state: dict[str, Any] = content["state"]
    return state
