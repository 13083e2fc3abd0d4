"""Operations: stock layers timed one by one, each once for a machine and its settings."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from rankfold.network.timing.turns import finished

ENOUGH = 0.015
"""Seconds after which an operation has run for long enough, if it ran `LEAST` times."""
LEAST = 3
MOST = 25
"""Runs of an operation, at least and at most, beside one to warm up."""


@dataclass(frozen=True)
class Operation:
    """A stock layer on one input: all that its time hangs on beside the machine.

    `kind` is its class in `torch.nn`; `batch` are the positions that are not spatial, `sizes` the spatial axes of what
    goes in; `padding` is of numbers, or a word that PyTorch knows.
    """

    kind: str
    batch: int
    inputs: int
    outputs: int
    groups: int = 1
    sizes: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    dtype: str = "float32"
    channels_last: bool = False

    def module(self, device: torch.device) -> nn.Module:
        """The layer, with weights of no meaning."""
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": getattr(torch, self.dtype)}
        if self.kernel:
            options |= {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
            options |= {"kernel_size": self.kernel, "groups": self.groups}
            if self.output_padding:
                options["output_padding"] = self.output_padding
        made: nn.Module = getattr(nn, self.kind)(self.inputs, self.outputs, **options)
        return made.to(memory_format=torch.channels_last) if self.channels_last else made  # pyrefly: ignore[no-matching-overload]

    def input(self, device: torch.device) -> torch.Tensor:
        """An input of the layer's."""
        x = torch.randn(self.batch, self.inputs, *self.sizes, device=device).to(getattr(torch, self.dtype))
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


@dataclass(frozen=True)
class Machine:
    """What times are of: a processor or an accelerator, PyTorch's version, and how many threads it may use."""

    name: str
    threads: int
    version: str

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """This machine as PyTorch is set up now."""
        if device.type == "cuda":
            return cls(torch.cuda.get_device_name(device), 0, torch.__version__)
        return cls(_processor(), torch.get_num_threads(), torch.__version__)


@dataclass
class Stopwatch:
    """Times of operations in nanoseconds, measured when they are first asked for, and kept in a file if there is one.

    A file is of one machine, and is put in the user's cache folder (`XDG_CACHE_HOME`, or ~/.cache) by `opened`.
    """

    device: torch.device
    file: Path | None = None
    known: dict[str, float] = field(default_factory=dict)
    measured: int = 0

    @classmethod
    def opened(cls, device: torch.device) -> Stopwatch:
        """A stopwatch that remembers what was measured on this machine before."""
        named = hashlib.sha256(repr(astuple(Machine.here(device))).encode()).hexdigest()[:16]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankfold"
        file = folder / f"times-{named}.json"
        return cls(device, file, _read(file))

    def of(self, operation: Operation) -> float:
        """The median time of an operation."""
        key = json.dumps(asdict(operation), separators=(",", ":"))
        if key not in self.known:
            self.known[key] = _timed(operation, self.device)
            self.measured += 1
        return self.known[key]

    def save(self) -> None:
        """Keeps what was measured, where that can be written."""
        if self.file is None or not self.measured:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            beside = self.file.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps({**_read(self.file), **self.known}))
            beside.replace(self.file)
        except OSError:  # a cache that cannot be kept is measured again
            return
        self.measured = 0


def _read(file: Path) -> dict[str, float]:
    """What a file holds; nothing where it is not there or damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, Mapping):
        return {}
    return {key: float(value) for key, value in content.items() if isinstance(value, (int, float)) and value > 0}


def _timed(operation: Operation, device: torch.device) -> float:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        module, x = operation.module(device).eval(), operation.input(device)
        module(x)
        finished(device)
        taken: list[float] = []
        while len(taken) < LEAST or (sum(taken) < ENOUGH and len(taken) < MOST):
            start = time.perf_counter()
            module(x)
            finished(device)
            taken.append(time.perf_counter() - start)
    return 1e9 * median(taken)


def _processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
