"""Models larger than memory: compressed from files to files, one block of layers at a time.

A directory of transformers is read by its configuration, which gives a network without weights. Its blocks stand in a
row; what enters the first one comes from the embedding, and every block is given its weights, measured on what reaches
it, and let go. Once all have been measured a plan is made, and every block is read again, fitted, and written out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rankfold.blockwise import BlockCurves, fit_block, measure_block, plan_blocks, whole_plan
from rankfold.budget import Budget, Cost
from rankfold.errors import ArtifactError, BudgetError
from rankfold.files.artifact import check_target
from rankfold.files.pretrained import is_ours
from rankfold.files.stream import Stream, batches_for, entering, row_of, skeleton
from rankfold.files.unfinished import Unfinished
from rankfold.memory import PLENTY, limited, trim
from rankfold.network.passes import digest_of
from rankfold.plan import Plan
from rankfold.planning import Decompositions, as_json
from rankfold.progress import Progress, silent
from rankfold.sharing import place
from rankfold.sources.shards import Shards, to_meta_

ALIGN = 8
"""What ranks and widths are multiples of."""


def compress_files(
    directory: str | Path,
    out: str | Path,
    *,
    budget: Budget,
    decomposition: Decompositions = "svd",
    calibration: Iterable[Any] | None = None,
    memory: int | str | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Plan:
    """Compresses a model that transformers saved in `directory`, with one block of it in memory at a time.

    The budget is of parameters, bytes, or MACs (a fraction: they are counted over the blocks on the first batch).
    `calibration` are batches of tokens (rows, length), or dicts of arguments; without any, random ones. Errors are
    weighed by what they cost the output of their own block, and factors are fitted layer by layer. `memory` limits what
    is taken besides a block's weights and the hidden states of all batches (two streams of them). With `resume`, what
    is done is kept beside `out` if the run is stopped, and the same call goes on from the last block, to the same
    result.

    What is written to `out` is loaded by `from_pretrained` after `import rankfold`, as `save_pretrained` writes it; the
    tokenizer and the generation configuration go with it. Returns the plan. Raises ModelError where the model's blocks
    do not stand in a row, and ArtifactError where `out` holds something else or cannot be written.
    """
    if "latency" in budget.given or "error" in budget.given:
        raise BudgetError("a model in files is compressed to a number of parameters, bytes or MACs; limit one of these")
    if place()[1] > 1:
        raise BudgetError("a model in files is compressed by one process; start one, not several")
    source, target = Path(directory), Path(out).absolute()
    check_target(target, is_ours)
    model, shards = skeleton(source), Shards(source)
    with limited(memory) as allowed, torch.no_grad():
        row = row_of(model)
        blocks = {f"{row}.{name}": block for name, block in model.get_submodule(row).named_children()}
        given = batches_for(model, calibration)
        start = entering(model, shards, row, list(blocks.values()), given)
        limit = {"memory": allowed} if memory is not None or allowed < PLENTY else {}
        run = _identity(source, shards, given, budget, decomposition, limit) if resume else {}
        unfinished = Unfinished(target, run, resumed=resume)
        try:
            found = _measured(unfinished, blocks, shards, start, decomposition, budget, progress)
            before = _cost(shards, found)
            plans, settings = plan_blocks(found, before, budget, progress)
            settings |= {
                "calibration": "random tokens" if calibration is None else "given inputs",
                "calibration_batches": len(given),
                **limit,
                "decomposition": as_json(decomposition),
            }
            plans = _written(unfinished, blocks, shards, start, plans, decomposition, progress)
            plan = whole_plan(plans, before, settings)
            unfinished.finish(source, model, plan)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ArtifactError(f"cannot write {target}: {reason}; nothing was changed") from error
        finally:
            unfinished.discard()
    return plan


def _identity(
    source: Path,
    shards: Shards,
    batches: Sequence[Any],
    budget: Budget,
    decomposition: Decompositions,
    memory: dict[str, int],
) -> dict[str, Any]:
    """What a run is known by: the same of it give the same result."""
    files = {name: (source / name).stat() for name in sorted({*shards.files.values(), "config.json"})}
    named = as_json(decomposition)
    return {
        "model": {name: [one.st_size, one.st_mtime_ns] for name, one in files.items()},
        "calibration": digest_of(batches),
        "budget": {name: str(limit) for name, limit in budget.given.items()},
        "units": list(budget.units),
        "memory": memory,
        "decomposition": [list(pair) for pair in named.items()] if isinstance(named, dict) else named,
    }


def _measured(
    unfinished: Unfinished,
    blocks: Mapping[str, nn.Module],
    shards: Shards,
    stream: Stream,
    decomposition: Decompositions,
    budget: Budget,
    progress: Progress,
) -> dict[str, BlockCurves]:
    """The curves of all blocks, each in memory in its turn."""
    found = {}
    for number, name, block in _in_turn(blocks, shards, progress, "measuring blocks"):
        known = unfinished.curves(number)
        if known is None:
            inputs = stream.at(number)
            known = measure_block(block, inputs, decomposition=decomposition, budget=budget, align=ALIGN)
            unfinished.keep(number, known)
        found[name] = known
        stream = stream.behind(block, number)
    return found


def _written(
    unfinished: Unfinished,
    blocks: Mapping[str, nn.Module],
    shards: Shards,
    stream: Stream,
    plans: Mapping[str, Plan],
    decomposition: Decompositions,
    progress: Progress,
) -> dict[str, Plan]:
    """The plans with the errors that were reached, once all blocks are fitted, and written with all else there is."""
    reached = {}
    for number, name, block in _in_turn(blocks, shards, progress, "fitting blocks"):
        done = unfinished.written(number)
        if done is None:
            student, done = fit_block(block, plans[name], stream.at(number), decomposition=decomposition)
            unfinished.add(number, name, student, done)
            del student
        reached[name] = done
        stream = stream.behind(block, number)
    for name in shards.files:
        if not any(name.startswith(f"{block}.") for block in blocks):
            unfinished.put(name, shards.read(name))
    return reached


def _in_turn(
    blocks: Mapping[str, nn.Module], shards: Shards, progress: Progress, what: str
) -> Iterator[tuple[int, str, nn.Module]]:
    """The blocks with their numbers and names, each with its weights while it is at hand."""
    for number, (name, block) in enumerate(blocks.items()):
        progress(what, number, len(blocks))
        shards.fill_(block, f"{name}.")
        yield number, name, block
        to_meta_(block)
        trim()
    progress(what, len(blocks), len(blocks))


def _cost(shards: Shards, blocks: dict[str, BlockCurves]) -> Cost:
    """What the whole model costs: all that is in the files, and the blocks' MACs."""
    sizes = [shards.size(name) for name in shards.files]
    macs = sum(block.cost.macs for block in blocks.values())
    return Cost(sum(entries for entries, _ in sizes), macs, sum(size for _, size in sizes))
