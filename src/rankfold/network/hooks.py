"""Hooks that are there for the length of a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.utils.hooks import RemovableHandle


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Takes hooks away at the end of the block that were attached at its start."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


def first_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What goes into a module that is called with these, by position or by name: the first of them."""
    return args[0] if args else next(iter(kwargs.values()))


class Reached(BaseException):
    """Ends a pass behind the module that it was made for; not an Exception, so that no model catches it."""
