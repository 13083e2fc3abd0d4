"""A compressed model as a directory: plan.json, model.safetensors, metrics.json; where there is any, the history of the
search in trace.json, what it chose from in curves.json, and in state.json the state of modules that is no tensor.

Written beside its place and moved there in one step, so that a killed save leaves the old directory or the new one.
Read without unpickling anything: the plan carries checksums of itself and of the other files.
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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rankfold.errors import ArtifactError, PlanError
from rankfold.files.state import check_fits, fill_, split, state_of
from rankfold.network.copies import duplicate, unwrapped
from rankfold.network.surgery import rebuilt
from rankfold.pipeline import Result
from rankfold.plan import KNOWN_PLAN, Plan

PLAN, WEIGHTS, METRICS, STATE = "plan.json", "model.safetensors", "metrics.json", "state.json"
TRACE, CURVES, EVALUATIONS, INPUTS = "trace.json", "curves.json", "evaluations.json", "inputs.json"
USAGE = "save(result, directory), save(model, plan, directory), or save(model, directory) for a model that was loaded"


@overload
def save(
    saved: Result | nn.Module,
    directory: str | Path,
    /,
    *,
    source: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path: ...
@overload
def save(
    saved: Result | nn.Module,
    /,
    *,
    directory: str | Path,
    source: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path: ...
@overload
def save(
    saved: nn.Module,
    /,
    plan: Plan,
    directory: str | Path,
    *,
    source: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path: ...
def save(
    saved: object,
    /,
    plan: object = None,
    directory: object = None,
    *,
    source: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a compressed model to a directory, in place of an earlier one, and returns its path.

    It is a result of `compress`; or a model, however it was trained since, with its plan, which one that `load` gave
    knows itself. Wrappers of several devices and of torch.compile are taken off. The errors in the plan stay those of
    the compression.

    `source` says where the original network came from (by default what the plan says), `metrics` what else was
    measured; both must be JSON. Raises PlanError for a model that is not the plan's; ArtifactError, with everything as
    it was, where the directory holds something else or cannot be written, or the model has state that is neither
    tensors nor JSON.
    """
    result, path = _what_and_where(saved, plan, directory)
    known = {name: value for name, value in result.plan.source.items() if name != "files"}
    result = replace(result, plan=replace(result.plan, source=dict(known if source is None else source)))
    state = state_of(result.model)
    check_fits(state, result.plan)
    target = path.absolute()
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir()
    except OSError as error:
        raise ArtifactError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        _write(partial, result, state, dict(metrics or {}))
        move_into_place(partial, target)
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

    Bit-equal to what was saved; the skeleton's own weights do not matter. It knows its plan (`plan_of`). Raises
    ArtifactError for a directory that is incomplete or altered, PlanError for a model that is not the plan's.
    """
    plan = load_plan(directory)
    path = Path(directory) / WEIGHTS
    _check_digest(path, plan.source.get("files", {}).get(WEIGHTS))
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); save it again") from error
    student = rebuilt(duplicate(unwrapped(model)), plan)
    fill_(student, tensors, _read_json(directory, STATE, plan) or {})
    setattr(student, KNOWN_PLAN, plan)
    return student.eval()


def plan_of(model: nn.Module) -> Plan:
    """The plan of a model that `load` gave, wrapped or trained since; raises PlanError for one that knows none."""
    plan = getattr(unwrapped(model), KNOWN_PLAN, None)
    if not isinstance(plan, Plan):
        raise PlanError(
            f"the model ({type(unwrapped(model)).__name__}) knows no plan, as those from rankfold.load do; give it: "
            "save(model, plan, directory)"
        )
    return plan


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
    return _read_json(directory, METRICS, load_plan(directory)) or {}


def load_trace(directory: str | Path) -> dict[str, Any] | None:
    """The search's history saved in `directory`, as `Trace.as_dict` gives it; None where the search keeps none."""
    return _read_json(directory, TRACE, load_plan(directory))


def load_curves(directory: str | Path) -> dict[str, Any] | None:
    """What the search chose from, as `rankfold.search.outline` draws it; None where it was not saved."""
    return _read_json(directory, CURVES, load_plan(directory))


def load_pictures(directory: str | Path) -> list[str]:
    """Some of what a saved model was calibrated on, as pictures in `data:` addresses; none where it was no images."""
    found = _read_json(directory, INPUTS, load_plan(directory)) or {}
    return [str(one) for one in found.get("pictures", ())]


def save_evaluation(directory: str | Path, data: str, found: Mapping[str, Any]) -> None:
    """Keeps what a saved model was scored with on some data, in evaluations.json; the latest for each data counts.

    It is not part of what is saved, and may go. Raises ArtifactError where it cannot be written.
    """
    text = json.dumps({**load_evaluations(directory), data: dict(found)}, indent=2)
    write_text(Path(directory) / EVALUATIONS, text + "\n")


def load_evaluations(directory: str | Path) -> dict[str, Any]:
    """What a saved model was scored with, by the data; empty where it was not."""
    path = Path(directory) / EVALUATIONS
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); remove it, and evaluate again") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} does not hold what evaluate writes; remove it, and evaluate again")
    return content


def write_text(path: Path, text: str) -> None:
    """Puts a text in its place in one step; raises ArtifactError where it cannot be written."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ArtifactError(f"cannot write {path}: {error.strerror}; nothing was changed") from error


def check_target(
    directory: str | Path, is_ours: Callable[[Path], bool] = lambda target: (target / PLAN).exists()
) -> None:
    """Raises ArtifactError where saving would replace anything but what was saved before or an empty directory."""
    target = Path(directory)
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} is a file; give the path of a directory")
    if any(target.iterdir()) and not is_ours(target):
        raise ArtifactError(f"{target} holds other files; give a new or empty directory")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _what_and_where(saved: object, plan: object, directory: object) -> tuple[Result, Path]:
    """A result, and where it goes, from what `save` was called with."""
    if plan is None:
        plan, directory = directory, None
    if isinstance(plan, Plan) and isinstance(directory, (str, Path)):
        if isinstance(saved, nn.Module):
            return Result(unwrapped(saved), plan, 0.0), Path(directory)
        if isinstance(saved, Result):
            raise ArtifactError(
                "a result has its plan: save(result, directory), or save(result.model, plan, directory)"
            )
    if isinstance(plan, (str, Path)) and directory is None:
        if isinstance(saved, nn.Module):
            return Result(unwrapped(saved), plan_of(saved), 0.0), Path(plan)
        if isinstance(saved, Result):
            return replace(saved, model=unwrapped(saved.model)), Path(plan)
    given = [one for one in (saved, plan, directory) if one is not None]
    kinds = ", ".join(type(one).__name__ for one in given)
    raise ArtifactError(f"save was given ({kinds}); it takes {USAGE}")


def _write(folder: Path, result: Result, state: Mapping[str, Any], metrics: dict[str, Any]) -> None:
    """The files, flushed to the disk; the plan last, with the checksums of the others."""
    tensors, rest = split(state)
    save_file(tensors, folder / WEIGHTS)
    content = {
        "before": result.before.as_dict(),
        "after": result.after.as_dict(),
        "kept": result.after.kept(result.before),
        **({"seconds": round(result.seconds, 3)} if result.seconds else {}),
        "layers": {layer.name: layer.error for layer in result.plan.layers},
        **metrics,
    }
    (folder / METRICS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    others = [WEIGHTS, METRICS]
    for name, optional in (
        (TRACE, result.trace and result.trace.as_dict()),
        (CURVES, dict(result.curves)),
        (INPUTS, result.pictures and {"pictures": result.pictures}),
        (STATE, rest),
    ):
        if optional:
            (folder / name).write_text(json.dumps(optional) + "\n", encoding="utf-8")
            others.append(name)
    files = {name: digest(folder / name) for name in others}
    plan = replace(result.plan, source={**result.plan.source, "files": files})
    (folder / PLAN).write_text(plan.to_json(), encoding="utf-8")
    shutil.copymode(folder / PLAN, folder / WEIGHTS)  # safetensors makes files that only their owner can read
    for name in (*others, PLAN):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def move_into_place(partial: Path, target: Path) -> None:
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


def _read_json(directory: str | Path, name: str, plan: Plan) -> dict[str, Any] | None:
    """What a file that the plan lists holds, None where it lists none of this name."""
    expected = plan.source.get("files", {}).get(name)
    if expected is None and name != METRICS:
        return None
    path = Path(directory) / name
    _check_digest(path, expected)
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
