"""A directory of weights in the making, beside its place, and what is done of it already where it is gone on with."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankfold.blockwise import KINDS, BlockCurves
from rankfold.errors import ArtifactError
from rankfold.files.artifact import move_into_place, write_text
from rankfold.files.pretrained import card
from rankfold.files.records import read_record, write_record
from rankfold.plan import Plan
from rankfold.sources.shards import INDEX, SINGLE, size_in

SHARD = 2**30
"""Bytes of a file of what is in no block, about."""
RUN, BUDGET = "run.json", "budget"
"""What says which run a directory is of, and the entry of it that curves do not hang on."""


class Unfinished:
    """Curves and files of blocks by their numbers, then what is in no block, and at last the whole in its place.

    With `resumed` it keeps what is done until all is, and finds it again where the `run` is the same: raises
    ArtifactError where the directory is of another one. Otherwise `discard` takes everything away.
    """

    def __init__(self, target: Path, run: Mapping[str, Any], *, resumed: bool) -> None:
        self.target, self.resumed = target, resumed
        self.partial = target.with_name(f".{target.name}{'' if resumed else f'.{uuid.uuid4().hex[:8]}'}.partial")
        self.files: list[list[str]] = []
        self.waiting: dict[str, Tensor] = {}
        self.bytes = 0
        if resumed:
            self._begin(dict(run))

    def curves(self, block: int) -> BlockCurves | None:
        """What was measured of a block, if it was."""
        path = self.partial / f"curves-{block:05d}.safetensors"
        if not (self.resumed and path.is_file()):
            return None
        found: BlockCurves = read_record(path, KINDS)
        return found

    def keep(self, block: int, found: BlockCurves) -> None:
        """Keeps what was measured of a block, where that may be of use."""
        if self.resumed:
            write_record(self.partial / f"curves-{block:05d}.safetensors", found)

    def written(self, block: int) -> Plan | None:
        """What became of a block, if it is written; its file counts then as one of the directory's."""
        path = self.partial / f"plan-{block:05d}.json"
        if not (self.resumed and path.is_file()):
            return None
        part = self.partial / _file(len(self.files))
        try:
            with safe_open(part, framework="pt") as file:
                names = list(file.keys())
                size = sum(size_in(file, name)[1] for name in names)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{part} cannot be read ({error}); remove {path}, and its block is made again"
            ) from error
        self.files.append(names)
        self.bytes += size
        return Plan.from_json(path.read_text(encoding="utf-8"))

    def add(self, number: int, prefix: str, block: nn.Module, plan: Plan) -> None:
        """Writes a block, with what keeps its replaced weights from being drawn at random (`quantizer.with_stops`)."""
        from rankfold.files.quantizer import with_stops

        state = with_stops(block.state_dict(), plan)
        self._write({f"{prefix}.{name}": tensor for name, tensor in state.items()})
        if self.resumed:
            write_text(self.partial / f"plan-{number:05d}.json", plan.to_json())

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
        places = {key: name for keys, name in zip(self.files, names, strict=True) for key in keys}
        index = {"metadata": {"total_size": self.bytes}, "weight_map": places}
        write_text(self.partial / INDEX, json.dumps(index, indent=2, sort_keys=True))
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = PlanConfig(plan.to_json()).to_dict()
        write_text(self.partial / "config.json", json.dumps(config, indent=2))
        write_text(self.partial / "README.md", card(model, plan, plain=False))
        others = list(_others(source))
        for file in others:
            shutil.copy(file, self.partial / file.name)
        for number, name in enumerate(names):
            (self.partial / _file(number)).rename(self.partial / name)
        wanted = {INDEX, "config.json", "README.md", *names, *(file.name for file in others)}
        for file in self.partial.iterdir():
            if file.name not in wanted:
                file.unlink()
        move_into_place(self.partial, self.target)
        self.resumed = False

    def discard(self) -> None:
        """Takes away what was not finished, unless it is to be gone on with."""
        if not self.resumed:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _begin(self, run: dict[str, Any]) -> None:
        """Takes over what is there of the same run; of one with another budget, what was measured."""
        path = self.partial / RUN
        try:
            known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except (OSError, ValueError):
            known = None
        if not isinstance(known, dict):
            shutil.rmtree(self.partial, ignore_errors=True)
        elif other := sorted(name for name in run if known.get(name) != run[name] and name != BUDGET):
            raise ArtifactError(
                f"{self.partial} holds the beginnings of another run (its {', '.join(other)} differ); remove it, or "
                "run the same again"
            )
        elif known.get(BUDGET) != run[BUDGET]:
            for file in (*self.partial.glob("plan-*"), *self.partial.glob("part-*")):
                file.unlink()
        if known != run:
            write_text(path, json.dumps(run))

    def _write(self, state: dict[str, Tensor]) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
        save_file(state, self.partial / _file(len(self.files)), metadata={"format": "pt"})
        self.files.append(list(state))
        self.bytes += sum(one.nbytes for one in state.values())


def _file(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _others(source: Path) -> Iterator[Path]:
    """The files beside the weights and the configuration: of the tokenizer, of generation, the licence."""
    for file in sorted(source.iterdir()):
        known = file.name in ("config.json", INDEX, SINGLE, "README.md")
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
        if file.is_file() and not known and not weights and not file.name.endswith(".index.json"):
            yield file
