"""The log of a training run: a CSV file with a line per step, that plots are made from."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO


class Log:
    """A CSV file with a line per step, made where a path is given; lines behind `began` are of an abandoned run."""

    def __init__(self, path: Path | None, began: int) -> None:
        self.began, self.header = began, False
        self.file: TextIO | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_text(encoding="utf-8").splitlines()[: began + 1] if began and path.is_file() else []
        self.header = bool(kept)
        self.file = path.open("w", encoding="utf-8", newline="", buffering=1)
        self.file.writelines(f"{line}\n" for line in kept)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *failure: object) -> None:
        if self.file:
            self.file.close()

    def line(self, step: int, epoch: int, rate: float, speed: float, losses: Mapping[str, float]) -> None:
        """A line of the step, its epoch, learning rate, examples per second, and losses by name."""
        if self.file is None:
            return
        writer = csv.writer(self.file, lineterminator="\n")
        if not self.header:
            writer.writerow(["step", "epoch", "rate", "examples_per_second", *losses])
            self.header = True
        writer.writerow([step, epoch, f"{rate:.6g}", f"{speed:.1f}", *(f"{value:.6g}" for value in losses.values())])
