"""New processes for tests, forked from one that has imported the large packages, but not rankfold."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CONTEXT = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
CONTEXT.set_forkserver_preload(["torch", "scipy.optimize", "accelerate"])


class Done(NamedTuple):
    """How a process ended, and what it wrote to either stream."""

    returncode: int
    told: str


class Running:
    """A function of a test module in a process of its own."""

    def __init__(self, folder: Path, function: Callable[..., None], *arguments: object) -> None:
        self.told = folder / f"told-{len(list(folder.glob('told-*')))}"
        self.told.touch()
        self.process = CONTEXT.Process(target=_run, args=(self.told, function, arguments))
        self.process.start()

    def finished(self, timeout: float = 200) -> Done:
        """Waits for the end."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.told.read_text()[-2000:]}"
        return Done(self.process.exitcode, self.told.read_text())


def run(folder: Path, function: Callable[..., None], *arguments: object) -> Done:
    """Runs a function of a test module in a new process; what it writes is kept in the folder."""
    return Running(folder, function, *arguments).finished()


def join(store: Path, rank: int, processes: int) -> None:
    """Makes this process one of a group over loopback, as a launcher does."""
    from torch import distributed

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in place.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)


def _run(told: Path, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    with told.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    function(*arguments)
