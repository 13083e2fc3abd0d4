"""What becomes of the small networks of every architecture: compressed, run, saved, loaded and exported, a row each.

    python benchmarks/architectures.py [NAME ... | --every K] [--out FILE] [--limit SECONDS]

Each is compressed to 70 % of its parameters, or to the least of 80, 90 and 95 % that it can be. The result has to give
outputs of the original's structure and sizes; to give the same bits when it is loaded by another process, onto weights
of another seed; and to be exported wherever the original is. What fails is a row that says at which step and why. Every
stage is a process with a time limit, so that a crash is a row as well.

Records are kept in benchmarks/results, or in FILE where it is given; those of named ones in FILE alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import record, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from zoo_of_architectures import ARCHITECTURES, Architecture

from rankfold import Budget, BudgetError, Plan, Result, compress, load, save
from rankfold.network.passes import arguments_of, run

FRACTIONS = (0.7, 0.8, 0.9, 0.95)
"""The budgets to try, of the parameters, in turn."""

PACKAGES = {"segmentation_models_pytorch": "segmentation-models-pytorch"}
"""What a library is installed as, where that is not what it is imported as."""

Note = Callable[..., None]
"""Writes down what a stage has found so far, so that it is there when the stage ends early."""


def main() -> None:
    """All architectures, or those named, in turn; or one stage of one, in the process that is started for it."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("names", nargs="*", metavar="NAME", help="architectures to try, instead of all")
    made.add_argument("--every", type=int, default=1, metavar="K", help="every K-th architecture, instead of all")
    made.add_argument("--out", type=Path, help="file for the records")
    made.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="for a stage of an architecture")
    made.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = made.parse_args()
    unknown = [name for name in arguments.names if name not in ARCHITECTURES]
    if unknown:
        made.error(f"no such architecture: {', '.join(unknown)}; known: {', '.join(ARCHITECTURES)}")
    if arguments.stage:
        sys.exit(stage(arguments.stage, ARCHITECTURES[arguments.names[0]], arguments.folder))
    records = []
    for name in arguments.names or list(ARCHITECTURES)[:: arguments.every]:
        records.append(record(**attempt(ARCHITECTURES[name], arguments.limit)))
        print(line(records[-1]), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n")
    print(f"{sum(one['result'] == 'pass' for one in records)} of {len(records)} pass")
    if not (arguments.out or arguments.names):
        write(records)


def attempt(one: Architecture, limit: float) -> dict[str, Any]:
    """An architecture's row: what its stages found, and "pass" or why not."""
    row: dict[str, Any] = {"name": one.name, "family": one.family, "library": one.library}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label in STAGES:
            command = [sys.executable, __file__, one.name, "--stage", label, "--folder", name]
            silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            try:
                code = subprocess.run(
                    command, timeout=limit, env={**os.environ, "HF_HUB_OFFLINE": "1"}, **silent
                ).returncode
                reason = f"the process ended with {code}" if code else ""
            except subprocess.TimeoutExpired:
                reason = f"not done in {limit:g} s"
            found = notes(folder)
            step, failed = found.pop("step", "start"), found.pop("failed", reason)
            row.update(found)
            if failed:
                return {**row, "result": f"{step}: {failed}"}
    return {**row, "result": "pass"}


def stage(label: str, one: Architecture, folder: Path) -> int:
    """Runs a stage in this process and notes why it fails, if it does; returns the exit code."""

    def note(**found: Any) -> None:
        with (folder / "notes").open("a") as file:
            file.write(json.dumps(found) + "\n")

    try:
        STAGES[label](one, folder, note)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        note(failed=f"{missing} is missing: pip install {PACKAGES.get(missing, missing)}")
    except Exception as error:
        note(failed=in_a_line(error))
    return 0


def notes(folder: Path) -> dict[str, Any]:
    """Everything the stages have noted, the later over the earlier."""
    path = folder / "notes"
    merged: dict[str, Any] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        merged.update(json.loads(text))
    return merged


def compress_stage(one: Architecture, folder: Path, note: Note) -> None:
    """Compresses, compares the outputs' structure, saves the result and the outputs."""
    note(step="build")
    model, inputs = one.build()
    note(step="run", params_before=sum(parameter.numel() for parameter in model.parameters()))
    wanted = outputs(model, inputs)
    note(step="compress")
    convolutions = any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())
    decomposition = "tucker" if convolutions else "svd"
    fraction, result = least(model, inputs, decomposition)
    note(
        decomposition=decomposition,
        budget=fraction,
        seconds=round(result.seconds, 2),
        params_after=result.after.params,
        decomposed=len(result.plan.decomposed),
        step="run compressed",
        **reach(model, result.plan),
    )
    given = outputs(result.model, inputs)
    if described(given, one.ragged) != described(wanted, one.ragged):
        raise ValueError(f"outputs were {described(wanted, one.ragged)}, are {described(given, one.ragged)}")
    if not all(torch.isfinite(tensor).all() for tensor in given[1]):
        raise ValueError("outputs are not finite")
    note(step="save")
    save(result, folder / "saved")
    save_file(
        {f"{i}": tensor.clone(memory_format=torch.contiguous_format) for i, tensor in enumerate(given[1])},
        folder / "outputs",
    )


def reload_stage(one: Architecture, folder: Path, note: Note) -> None:
    """Loads the saved result onto another seed's weights, compares the outputs, and exports original and result."""
    note(step="load")
    model, inputs = one.build(seed=1)
    loaded = load(folder / "saved", model)
    given, wanted = outputs(loaded, inputs)[1], load_file(folder / "outputs")
    if len(given) != len(wanted) or not all(torch.equal(tensor, wanted[f"{i}"]) for i, tensor in enumerate(given)):
        raise ValueError("outputs are not those that were saved, bit for bit")
    note(step="export the original")
    args, kwargs = arguments_of(inputs)
    with torch.no_grad():
        try:
            torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:
            note(export=f"nor is the original: {in_a_line(error)}")
            return
        note(step="export")
        torch.export.export(loaded, args, kwargs, strict=False)
    note(export="yes")


STAGES: dict[str, Callable[[Architecture, Path, Note], None]] = {"compress": compress_stage, "reload": reload_stage}


def least(model: nn.Module, inputs: Any, decomposition: str) -> tuple[float, Result]:
    """The first of the fractions that can be met, and the result; raises BudgetError where none can."""
    *others, last = FRACTIONS
    for fraction in others:
        with suppress(BudgetError):
            return fraction, compressed(model, inputs, decomposition, fraction)
    return last, compressed(model, inputs, decomposition, last)


def compressed(model: nn.Module, inputs: Any, decomposition: str, fraction: float) -> Result:
    """The result at a fraction of the parameters, by the errors of the weights."""
    budget = Budget(params=fraction)
    return compress(model, inputs, decomposition=decomposition, budget=budget, calibration="none")


def outputs(model: nn.Module, inputs: Any) -> tuple[str, list[Tensor]]:
    """The structure of a network's outputs, and the tensors in it; the same random numbers are drawn every time."""
    torch.manual_seed(0)
    leaves, structure = tree_flatten(run(model, inputs))
    return str(structure), [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def described(given: tuple[str, list[Tensor]], ragged: bool) -> tuple[str, ...]:
    """Structure, types and sizes of outputs; of ragged ones the number of axes for the sizes."""
    structure, tensors = given
    return structure, *(f"{t.dtype} {t.ndim if ragged else list(t.shape)}" for t in tensors)


def reach(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """The share of parameters that a decomposition could have been chosen for, and the reason that costs the most."""
    lost: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        owner = name.split(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        if owner in plan.skipped:
            lost[plan.skipped[owner].partition(":")[0]] += parameter.numel()
    total = plan.before.params
    within = sum(layer.before.params for layer in plan.layers)
    shares = {"within_reach": round(within / total, 4)}
    if not lost:
        return shares
    reason, count = lost.most_common(1)[0]
    return {**shares, "most_skipped": reason, "most_skipped_share": round(count / total, 4)}


def in_a_line(error: Exception) -> str:
    """An error's type and the beginning of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}"


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    numbers = ""
    if "params_after" in row:
        numbers = (
            f"{row['params_before'] / 1e6:6.2f} M  kept {row['params_after'] / row['params_before']:6.1%}"
            f"  in reach {row['within_reach']:6.1%}  {row['seconds']:6.1f} s"
        )
    return f"{row['name']:24} {row['family']:22} {numbers:50} {row['result']}"


if __name__ == "__main__":
    main()
