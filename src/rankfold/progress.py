"""How long-running functions tell how far they are."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Called with what is being done, how many steps are done, how many there are, and how it goes, in a few words."""

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None: ...


def silent(what: str, done: int, total: int, note: str = "", /) -> None:
    """A progress report that nobody reads."""
