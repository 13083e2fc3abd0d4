"""A compressed model as a directory: plan.json, model.safetensors, metrics.json, and trace.json of the search if any.

Written beside its place and moved there in one step, so that a killed save leaves the old directory or the new one.
Read without unpickling anything: the plan carries checksums of itself and of the other two files.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankfold.errors import ArtifactError, PlanError
from rankfold.network.copies import duplicate, unwrapped
from rankfold.network.surgery import rebuilt
from rankfold.pipeline import Result
from rankfold.plan import Plan

PLAN, WEIGHTS, METRICS, TRACE = "plan.json", "model.safetensors", "metrics.json", "trace.json"


def save(
    result: Result,
    directory: str | Path,
    *,
    source: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a result to `directory`, in place of an earlier one, and returns its path.

    `source` says where the original network came from, `metrics` what else was measured; both must be JSON. Raises
    ArtifactError, with everything as it was, where the directory holds something else or cannot be written.
    """
    target = Path(directory).absolute()
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir()
    except OSError as error:
        raise ArtifactError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        _write(partial, result, dict(source or {}), dict(metrics or {}))
        _move_into_place(partial, target)
    except OSError as error:
        hint = "; free some space and save again" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}; nothing was changed{hint}") from error
    except SafetensorError as error:
        raise ArtifactError(f"cannot write {target}: {error}; nothing was changed; free some space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def load(directory: str | Path, model: nn.Module) -> nn.Module:
    """The compressed model saved in `directory`, built on a copy of `model`, a freshly built original.

    Bit-equal to what was saved; the skeleton's own weights do not matter. Raises ArtifactError for a directory that is
    incomplete or altered, PlanError for a model that is not the plan's.
    """
    plan = load_plan(directory)
    path = Path(directory) / WEIGHTS
    _check_digest(path, plan.source.get("files", {}).get(WEIGHTS))
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); save it again") from error
    student = rebuilt(duplicate(unwrapped(model)), plan)
    _fill_(student, tensors)
    return student.eval()


def load_plan(directory: str | Path) -> Plan:
    """The plan saved in `directory`; raises ArtifactError where there is none that can be trusted."""
    path = Path(directory) / PLAN
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"{directory} holds no {PLAN}; it is not a saved model") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error})") from error
    try:
        return Plan.from_json(text)
    except PlanError as error:
        raise ArtifactError(f"{path}: {error}") from error


def load_metrics(directory: str | Path) -> dict[str, Any]:
    """The metrics saved in `directory`."""
    path = Path(directory) / METRICS
    _check_digest(path, load_plan(directory).source.get("files", {}).get(METRICS))
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def load_trace(directory: str | Path) -> dict[str, Any] | None:
    """The search's history saved in `directory`, as `Trace.as_dict` gives it; None where the search keeps none."""
    expected = load_plan(directory).source.get("files", {}).get(TRACE)
    if expected is None:
        return None
    path = Path(directory) / TRACE
    _check_digest(path, expected)
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def check_target(directory: str | Path) -> None:
    """Raises ArtifactError where saving would replace anything but a saved model or an empty directory."""
    target = Path(directory)
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} is a file; give the path of a directory")
    if any(target.iterdir()) and not (target / PLAN).exists():
        raise ArtifactError(f"{target} holds other files; give a new or empty directory")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _write(folder: Path, result: Result, source: dict[str, Any], metrics: dict[str, Any]) -> None:
    """The files, flushed to the disk; the plan last, with the checksums of the others."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, tensor in result.model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:  # a tied tensor is stored under its first name
            continue
        seen.add(key)
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    save_file(tensors, folder / WEIGHTS)
    content = {
        "before": vars(result.before),
        "after": vars(result.after),
        "kept": result.after.kept(result.before),
        "seconds": round(result.seconds, 3),
        "layers": {layer.name: layer.error for layer in result.plan.layers},
        **metrics,
    }
    (folder / METRICS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    others = [WEIGHTS, METRICS]
    if result.trace is not None:
        (folder / TRACE).write_text(json.dumps(result.trace.as_dict()) + "\n", encoding="utf-8")
        others.append(TRACE)
    files = {name: digest(folder / name) for name in others}
    plan = replace(result.plan, source={**source, "files": files})
    (folder / PLAN).write_text(plan.to_json(), encoding="utf-8")
    shutil.copymode(folder / PLAN, folder / WEIGHTS)  # safetensors makes files that only their owner can read
    for name in (*others, PLAN):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _move_into_place(partial: Path, target: Path) -> None:
    """Puts the finished directory at its place in one step; an earlier one ends up at `partial`."""
    if not target.exists():
        partial.rename(target)
    elif not _exchange(partial, target):
        earlier = target.with_name(f".{target.name}.earlier")
        shutil.rmtree(earlier, ignore_errors=True)
        target.rename(earlier)  # the platform cannot exchange two directories: the earlier one waits under this name
        partial.rename(target)
        shutil.rmtree(earlier)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two directories in one system call, where the platform has one."""
    name, flags = {"linux": ("renameat2", 2), "darwin": ("renameatx_np", 2)}.get(sys.platform, ("", 0))
    swap = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if swap is None:
        return False
    here = -2 if sys.platform == "darwin" else -100  # AT_FDCWD
    return bool(swap(here, os.fsencode(first), here, os.fsencode(second), flags) == 0)


def _check_digest(path: Path, expected: str | None) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; the directory is incomplete, save it again")
    if digest(path) != expected:
        raise ArtifactError(f"{path} was truncated or altered after it was saved: its checksum is not the plan's")


def _fill_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives every parameter and buffer its saved values and dtype, in place; ties stay."""
    state = model.state_dict(keep_vars=True)
    unknown = sorted(set(tensors) - set(state))
    filled = {id(state[name]) for name in tensors if name in state}
    missing = sorted(name for name, tensor in state.items() if id(tensor) not in filled)
    if unknown or missing:
        names = ", ".join([*missing, *unknown][:5])
        raise PlanError(f"the saved weights do not fit the model: {names}; build the model the plan was made for")
    for name, tensor in tensors.items():
        place = state[name]
        if place.shape != tensor.shape:
            raise PlanError(f"{name}: saved with shape {tuple(tensor.shape)}, the model has {tuple(place.shape)}")
        device = torch.device("cpu") if place.is_meta else place.device
        place.data = tensor.to(device)
