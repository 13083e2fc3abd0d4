"""The errors rankfold raises, as one tree: every one of them is a `RankfoldError`.

RankfoldError
├── ModelError      the network, its weights or its example inputs
├── BudgetError     a budget that cannot be read, or cannot be met
├── SearchError     a search that cannot go on
├── TrainingError   fine-tuning that cannot start, or cannot go on
├── PlanError       a plan that cannot be read, or does not fit the model
├── UnknownNameError  a name or pattern that matches nothing; carries the nearest ones
├── DataError       evaluation data
└── ArtifactError   a directory that cannot be written or read
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankfoldError(Exception):
    """Base of everything that a user can put right; its text says what to do next."""


class ModelError(RankfoldError):
    """The network, its weights or its example inputs cannot be used as they are."""


class BudgetError(RankfoldError):
    """A budget that cannot be read, or that no plan can meet."""


class SearchError(RankfoldError):
    """A search that cannot go on: a loss or a weight of its own is not finite."""


class TrainingError(RankfoldError):
    """Fine-tuning with settings that do not fit each other or the model, or whose loss is not finite."""


class PlanError(RankfoldError):
    """A plan that cannot be read, or that does not fit the model it is applied to."""


class UnknownNameError(RankfoldError):
    """A name or pattern that matches nothing."""

    def __init__(self, what: str, given: str, allowed: Iterable[str]) -> None:
        super().__init__(f"{what} {given!r} matches nothing; {nearest(given, allowed)}")


class DataError(RankfoldError):
    """Evaluation data that cannot be read or does not fit the model."""


class ArtifactError(RankfoldError):
    """A saved directory that cannot be written, or cannot be trusted when read."""


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(given: str, allowed: Iterable[str], *, most: int = 5) -> str:
    """A phrase that names the `most` entries of `allowed` closest to `given`, or else the first of them."""
    names = list(dict.fromkeys(allowed))
    close = difflib.get_close_matches(given, names, n=most, cutoff=0.4)
    if close:
        return "nearest: " + ", ".join(close)
    shown = ", ".join(names[:most]) + (", …" if len(names) > most else "")
    return f"known: {shown}" if names else "there are none to choose from"
