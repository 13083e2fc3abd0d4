"""Walks: passes that wait at one layer after another, so that a network is run once however many layers are looked at.

Every walk is a pass over one batch in a thread of its own, of which one runs at a time. It stops where a layer is
called, keeps what the pass has made so far, and goes on when it is told to; layers may be changed in between.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rankfold.network.hooks import attached, first_given
from rankfold.network.passes import Inputs


class _Ended(BaseException):
    """Ends a pass that nobody follows any more; not an Exception, so that no model catches it."""


class Walk:
    """One pass over a batch that waits at its stops, which are numbered in the order in which they are expected.

    `kept` are values seen before a stop that is still to come, or where the pass waits, by its number.
    """

    def __init__(self, forward: Callable[[], object]) -> None:
        self._forward = forward
        self._go, self._arrived = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._threads = torch.get_num_threads()
        self._started = self._over = self._ending = False
        self._error: BaseException | None = None
        self.place = -1
        self.value: Any = None
        self.kept: dict[int, Any] = {}

    def to(self, place: int) -> Any:
        """What there is at a stop, where the pass then waits; None where it never comes by."""
        while not self._over and self.place < place:
            self._advance()
        return self.value if self.place == place and not self._over else None

    def end(self) -> None:
        """Leaves the pass where it is."""
        self._ending = True
        if self._started and not self._over:
            self._advance()

    def stop(self, place: int, value: Any) -> None:
        """Waits at a stop; called within the pass."""
        if place <= self.place:
            return
        self.place, self.value = place, value
        state = _random_state()
        self._arrived.release()
        self._go.acquire()
        self.value = None
        self.kept.pop(place, None)
        if self._ending:
            raise _Ended
        _set_random_state(state)

    def keep(self, place: int, value: Any) -> None:
        """Keeps a value for a stop; called within the pass."""
        self.kept[place] = value

    def _advance(self) -> None:
        state = _random_state()
        if self._started:
            self._go.release()
        else:
            self._started = True
            self._thread.start()
        self._arrived.acquire()
        _set_random_state(state)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        _walks[threading.get_ident()] = self
        try:
            torch.set_num_threads(self._threads)
            self._forward()
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
        finally:
            del _walks[threading.get_ident()]
            self._over = True
            self._arrived.release()


_walks: dict[int, Walk] = {}
"""The walks that have begun, by their threads."""


@contextmanager
def walking(
    model: nn.Module,
    stops: Mapping[nn.Module, int],
    forward: Callable[[Inputs, int], object],
    batches: Iterable[Inputs],
    *,
    outputs: bool,
    arguments: bool = False,
    keeping: Mapping[int, tuple[nn.Module, bool]] | None = None,
) -> Iterator[list[Walk]]:
    """Walks over batches, which stop at what goes into some modules, or at their `outputs`; ended when it is left.

    What goes in is the first argument, or with `arguments` all of them, by position and by name. For some stops what
    goes into another module, or where that is said what it gives, is in `keeping` from when it is there.
    """

    def told(tell: Callable[[Walk, int, Any], None], place: int) -> Callable[[Any], None]:
        def see(value: Any) -> None:
            walk = _walks.get(threading.get_ident())
            if walk is not None:
                tell(walk, place, value)

        return see

    hooks = [
        _watched(module, told(Walk.stop, place), output=outputs, arguments=arguments) for module, place in stops.items()
    ]
    hooks += [
        _watched(module, told(Walk.keep, place), output=given) for place, (module, given) in (keeping or {}).items()
    ]
    walks = [Walk(partial(forward, batch, number)) for number, batch in enumerate(batches)]
    with attached(hooks):
        try:
            yield walks
        finally:
            for walk in walks:
                walk.end()


def _watched(
    module: nn.Module, see: Callable[[Any], None], *, output: bool, arguments: bool = False
) -> RemovableHandle:
    """A hook that sees what goes into a module, the first argument or all of them, or its output."""
    if output:
        return module.register_forward_hook(lambda _, args, given: see(given))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see((args, kwargs) if arguments else first_given(args, kwargs))

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _random_state() -> tuple[Tensor, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_random_state(state: tuple[Tensor, Any, Any]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
