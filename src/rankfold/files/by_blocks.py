"""Models larger than memory: compressed from files to files, one block of layers at a time.

A directory of transformers is read by its configuration, which gives a network without weights. Its blocks stand in a
row; what enters the first one comes from the embedding, and every block is given its weights, measured on what reaches
it, and let go. Once all have been measured a plan is made, and every block is read again, fitted, and written out.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rankfold.blockwise import BlockCurves, fit_block, measure_block, plan_blocks, whole_plan
from rankfold.budget import Budget, Cost
from rankfold.errors import ArtifactError, BudgetError
from rankfold.files.artifact import check_target, move_into_place
from rankfold.files.pretrained import card, is_ours
from rankfold.files.stream import Stream, batches_for, entering, row_of, skeleton
from rankfold.memory import limited, trim
from rankfold.plan import Plan
from rankfold.planning import Decompositions, as_json
from rankfold.progress import Progress, silent
from rankfold.sources.shards import INDEX, SINGLE, Shards, to_meta_

SHARD = 2**30
"""Bytes of a file of what is in no block, about."""
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
    progress: Progress = silent,
) -> Plan:
    """Compresses a model that transformers saved in `directory`, with one block of it in memory at a time.

    The budget is of parameters, bytes, or MACs (a fraction: they are counted over the blocks on the first batch).
    `calibration` are batches of tokens (rows, length), or dicts of arguments; without any, random ones. Errors are
    weighed by what they cost the output of their own block, and factors are fitted layer by layer. `memory` limits what
    is taken besides a block's weights and the hidden states of all batches (two streams of them).

    What is written to `out` is loaded by `from_pretrained` after `import rankfold`, as `save_pretrained` writes it; the
    tokenizer and the generation configuration go with it. Returns the plan. Raises ModelError where the model's blocks
    do not stand in a row, and ArtifactError where `out` holds something else or cannot be written.
    """
    if "latency" in budget.given or "error" in budget.given:
        raise BudgetError("a model in files is compressed to a number of parameters, bytes or MACs; limit one of these")
    source, target = Path(directory), Path(out).absolute()
    check_target(target, is_ours)
    model, shards = skeleton(source), Shards(source)
    with limited(memory) as allowed, torch.no_grad():
        row = row_of(model)
        blocks = {f"{row}.{name}": block for name, block in model.get_submodule(row).named_children()}
        given = batches_for(model, calibration)
        start = entering(model, shards, row, list(blocks.values()), given)
        found = _measured(blocks, shards, start, decomposition, budget, progress)
        before = _cost(shards, found)
        plans, settings = plan_blocks(found, before, budget, progress)
        settings |= {
            "calibration": "random tokens" if calibration is None else "given inputs",
            "calibration_batches": len(given),
            "memory": allowed,
            "decomposition": as_json(decomposition),
        }
        writer = _Writer(target)
        try:
            plans = _written(writer, blocks, shards, start, plans, decomposition, progress)
            plan = whole_plan(plans, before, settings)
            writer.finish(source, model, plan)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ArtifactError(f"cannot write {target}: {reason}; nothing was changed") from error
        finally:
            writer.discard()
    return plan


def _measured(
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
        found[name] = measure_block(block, stream.at(number), decomposition=decomposition, budget=budget, align=ALIGN)
        stream = stream.behind(block, number)
    return found


def _written(
    writer: _Writer,
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
        student, reached[name] = fit_block(block, plans[name], stream.at(number), decomposition=decomposition)
        writer.add(name, student, reached[name])
        stream = stream.behind(block, number)
        del student
    for name in shards.files:
        if not any(name.startswith(f"{block}.") for block in blocks):
            writer.put(name, shards.read(name))
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


class _Writer:
    """A directory of weights in the making, beside its place."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        self.files: list[list[str]] = []
        self.waiting: dict[str, Tensor] = {}
        self.bytes = 0

    def add(self, prefix: str, block: nn.Module, plan: Plan) -> None:
        """Writes a block, with what keeps its replaced weights from being drawn at random (`quantizer.with_stops`)."""
        from rankfold.files.quantizer import with_stops

        state = with_stops(block.state_dict(), plan)
        self._write({f"{prefix}.{name}": tensor for name, tensor in state.items()})

    def put(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor with others, a gigabyte or so at once."""
        self.waiting[name] = tensor
        if sum(one.nbytes for one in self.waiting.values()) >= SHARD:
            self._write(self.waiting)
            self.waiting = {}

    def finish(self, source: Path, model: Any, plan: Plan) -> None:
        """Writes what is left, the configuration and what else there was, and moves all into its place."""
        from rankfold.files.quantizer import PlanConfig

        if self.waiting:
            self._write(self.waiting)
        names = [f"model-{k + 1:05d}-of-{len(self.files):05d}.safetensors" for k in range(len(self.files))]
        for number, name in enumerate(names):
            (self.partial / self._file(number)).rename(self.partial / name)
        places = {key: name for keys, name in zip(self.files, names, strict=True) for key in keys}
        index = {"metadata": {"total_size": self.bytes}, "weight_map": places}
        (self.partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = PlanConfig(plan.to_json()).to_dict()
        (self.partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        for file in _others(source):
            shutil.copy(file, self.partial / file.name)
        (self.partial / "README.md").write_text(card(model, plan, plain=False), encoding="utf-8")
        move_into_place(self.partial, self.target)

    def discard(self) -> None:
        """Takes away what was not finished."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _write(self, state: dict[str, Tensor]) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
        save_file(state, self.partial / self._file(len(self.files)), metadata={"format": "pt"})
        self.files.append(list(state))
        self.bytes += sum(one.nbytes for one in state.values())

    def _file(self, number: int) -> str:
        return f"part-{number:05d}.safetensors"


def _others(source: Path) -> Iterator[Path]:
    """The files beside the weights and the configuration: of the tokenizer, of generation, the licence."""
    for file in sorted(source.iterdir()):
        known = file.name in ("config.json", INDEX, SINGLE, "README.md")
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
        if file.is_file() and not known and not weights and not file.name.endswith(".index.json"):
            yield file
