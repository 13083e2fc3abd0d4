"""Replay: passes with other weights in some layers, which start at the first of them.

What comes before the layers that change gives the same in every pass over the same inputs: its outputs are kept, module
by module, and given back instead of computed again. Layers that are changed one at a time, all over a network, take
about half the time so, whatever the network is made of.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.memory import share
from rankfold.network.passes import Inputs, device_of, evaluating, output_of, run_with, same
from rankfold.network.precision import in_bfloat16

SHARE = 0.125
"""Part of the memory that outputs may take that are kept; modules whose outputs are not are run again.

Of too many, those of the innermost modules go first, as a block's output stands for all inside, of these the largest,
and of these the latest, which fewer changes come after.
"""
LARGEST_SHARE = 2**30
"""Bytes of them at most."""


class Replay:
    """A network on one batch of inputs, to be run with other tensors in place of some of its parameters.

    Modules that are called once in a pass and give one tensor are replayed, where that leaves the output as it is.
    Passes are in bfloat16 where that is asked for (`narrow`).
    """

    def __init__(self, model: nn.Module, inputs: Inputs, *, narrow: bool = False) -> None:
        self.model, self.inputs, self.narrow = model, inputs, narrow
        self._kept: dict[nn.Module, Tensor] = {}
        calls: dict[nn.Module, int] = {}
        depth = {module: name.count(".") for name, module in model.named_modules()}
        first_to_go: list[tuple[int, int, int, nn.Module]] = []
        room = share(SHARE, LARGEST_SHARE)

        def keep(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal room
            output = forward(*args, **kwargs)
            calls[module] = calls.get(module, 0) + 1
            if type(output) is Tensor and calls[module] == 1:
                self._kept[module] = output.clone()
                room -= output.nbytes
                heapq.heappush(first_to_go, (-depth[module], -output.nbytes, -len(calls), module))
            while room < 0:
                room += self._kept.pop(heapq.heappop(first_to_go)[-1]).nbytes
            return output

        self.output = self._run({}, keep)
        self._kept = {module: tensor for module, tensor in self._kept.items() if calls[module] == 1}
        if not self._faithful([module for module in calls if _own(module)]):
            self._kept = {}

    def _faithful(self, layers: Sequence[nn.Module]) -> bool:
        """Whether a replay up to the last layer gives what the network does, after a pass in which all was otherwise.

        It does not where modules leave something behind, which others read in the same pass.
        """
        if not self._kept or not layers:
            return True
        first = _own(layers[0])
        zeros = {name: torch.zeros_like(one) for name, one in self.model.named_parameters() if one in first}
        self._run(zeros, lambda module, forward, *args, **kwargs: forward(*args, **kwargs))
        again, whole = output_of(self._run({}, self._replaying({layers[-1]}))), output_of(self.output)
        return same([again], [whole])

    def __call__(self, named: Mapping[str, Tensor]) -> Any:
        """The network's output with other tensors for some parameters, by their names."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        changed = {parameters[name] for name in named}
        return self._run(named, self._replaying({one for one in self.model.modules() if changed & _own(one)}))

    def _replaying(self, changed: set[nn.Module]) -> Callable[..., Any]:
        """Calls of modules, in one pass: what was kept up to the first of those that are `changed`."""
        outside = {module for module in self._kept if not any(inner in changed for inner in module.modules())}
        reached = self.model in changed

        def call(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal reached
            reached = reached or module in changed
            return self._kept[module].clone() if module in outside and not reached else forward(*args, **kwargs)

        return call

    def _run(self, named: Mapping[str, Tensor], call: Callable[..., Any]) -> Any:
        narrow = in_bfloat16(device_of(self.model), enabled=self.narrow)
        with evaluating(self.model), torch.no_grad(), narrow, _intercepted(self.model, call):
            return run_with(self.model, named, self.inputs)


@contextmanager
def _intercepted(model: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """The calls of a model's modules, but for itself, made by `call(module, forward, *args, **kwargs)`."""
    modules = [one for one in model.modules() if one is not model and not isinstance(one, torch.jit.ScriptModule)]
    earlier = {one: vars(one).get("forward") for one in modules}
    for one in modules:
        one.forward = partial(call, one, one.forward)
    try:
        yield
    finally:
        for one, forward in earlier.items():
            if forward is None:
                del one.forward
            else:
                one.forward = forward


def _own(module: nn.Module) -> set[Tensor]:
    return set(module.parameters(recurse=False))
