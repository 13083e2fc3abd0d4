"""Memory: how much of it may be taken for what is kept besides the networks themselves.

Shares of it are a function of the limit, not of what happens to be free, so that the same limit gives the same result.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from rankfold.errors import BudgetError

LEAST = 2**28
"""Bytes that are needed in any case, a quarter of a gigabyte."""
PLENTY = 2**32
"""Bytes from which on more changes no result: all shares that results depend on are at their most."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
_limit: ContextVar[int | None] = ContextVar("limit", default=None)


@contextmanager
def limited(given: int | str | None) -> Iterator[int]:
    """Limits what is taken within the block: to bytes, or a text such as "4GB"; None: as `usual`.

    Raises BudgetError for what is no size, or too small.
    """
    limit = usual() if given is None else _bytes(given)
    token = _limit.set(limit)
    try:
        yield limit
    finally:
        _limit.reset(token)


def share(part: float, most: int | None = None) -> int:
    """Bytes of a part of the limit, or `most` if that is less."""
    limit = _limit.get()
    allowed = int(part * (usual() if limit is None else limit))
    return allowed if most is None else min(allowed, most)


def trim() -> None:
    """Gives back to the system what has been freed.

    C libraries keep it for the thread that had asked for it, and passes that wait are threads.
    """
    if _trim is not None:
        _trim(0)


def usual() -> int:
    """Half of what is free, where the system tells; else two gigabytes."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        free = 4 * 2**30
    return max(free // 2, LEAST)


def _bytes(given: int | str) -> int:
    """A size in bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", str(given).lower())
    if isinstance(given, bool) or match is None:
        raise BudgetError(f"memory {given!r} is no size; give bytes, or a text such as '4GB' or '512MiB'")
    size = int(float(match.group(1)) * _UNITS[match.group(2) or ""])
    if size < LEAST:
        raise BudgetError(f"memory {given!r} is too little; give at least {LEAST // 2**20} MiB")
    return size
