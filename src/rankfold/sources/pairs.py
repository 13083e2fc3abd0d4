"""Pairs of sentences with how alike people found them, as STS-B has them."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rankfold.errors import DataError

KIND = "pairs:"


@dataclass(frozen=True)
class Pairs:
    """Sentences side by side, and a score for every pair: the higher, the more alike."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.scores)


def is_pairs(spec: str) -> bool:
    """Whether a specification of data is that of pairs of sentences."""
    return spec.startswith(KIND)


def open_pairs(spec: str) -> Pairs:
    """The pairs in the file of "pairs:FILE", of comma- or (.tsv) tab-separated values: sentence, sentence, score.

    A first row without a number is a heading. Raises DataError for what cannot be read, and for fewer than three pairs.
    """
    path = Path(spec.removeprefix(KIND))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            rows = list(csv.reader(file, **cast(Any, tabs)))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a readable table in UTF-8: {error}") from error
    scored = [(number, row, _score(row)) for number, row in enumerate(rows, 1) if row]
    if scored and len(scored[0][1]) == 3 and math.isnan(scored[0][2]):
        del scored[0]
    for number, row, score in scored:
        if math.isnan(score):
            what = f"its score is {row[2]!r}" if len(row) == 3 else f"it has {len(row)} fields"
            raise DataError(f"{path}, row {number}: {what}; a row is a sentence, another one, and a number")
    if len(scored) < 3:
        raise DataError(f"{path} holds {len(scored)} pairs of sentences; a correlation needs at least 3")
    first, second, scores = zip(*((row[0], row[1], score) for _, row, score in scored), strict=True)
    return Pairs(first, second, scores)


def _score(row: Sequence[str]) -> float:
    """The third of three fields, not a number where it is none."""
    try:
        return float(row[2]) if len(row) == 3 else math.nan
    except ValueError:
        return math.nan
