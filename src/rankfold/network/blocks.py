"""Blocks: the modules that a network is a row of, as far as a pass shows that they can be looked at one by one.

A block is what stands in a row (`nn.Sequential`, `nn.ModuleList`): residual blocks, transformer layers, the layers of a
plain convolutional network, but not what holds more than half of all changed layers, which is looked into; and every
changed layer that is in none is one of its own. It is called once in a pass, and what it gives is a tensor, or begins
with one, that is as large in the student as in the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

from torch import Tensor, nn

from rankfold.errors import ModelError, UnknownNameError
from rankfold.network.finding import matches
from rankfold.network.hooks import attached
from rankfold.network.passes import Inputs, run, tensors_in
from rankfold.network.tracing import holds_statistics


def find_blocks(
    model: nn.Module, student: nn.Module, inputs: Inputs, changed: Set[str], *, given: Sequence[str] = ()
) -> dict[str, int]:
    """The blocks around some changed layers, by name in the order of their calls, with the bytes in and out of each.

    Where patterns of names are `given` the blocks are those; raises UnknownNameError for a pattern that matches none,
    and ModelError for a module that is called more than once, or does not give a tensor of the same size in both.
    """
    rows = list(_rows(model, "", changed))
    inside = {next((row for row in rows if f"{name}.".startswith(f"{row}.")), name) for name in changed}
    if given:
        inside = _named(model, given)
    original, own = (_calls(one, inside, inputs) for one in (model, student))
    found = {
        name: calls[0][1]
        for name, calls in original.items()
        if len(calls) == 1 and [shape for shape, _ in calls] == [shape for shape, _ in own.get(name, [])]
    }
    if given and (left := sorted(inside - found.keys())):
        raise ModelError(
            f"{left[0]} is no block: it is not called just once, or what it gives is no tensor of the same size in the "
            "compressed network; name others"
        )
    return found


class WithNorm(nn.Module):
    """A block and the batch norm that takes what it gives."""

    def __init__(self, block: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.block, self.norm = block, norm

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.norm(first_tensor(self.block(*args, **kwargs)))


def norms_behind(model: nn.Module, blocks: Sequence[str], inputs: Inputs) -> dict[str, str]:
    """The batch norms that take what some blocks give, as it is, by the blocks' names.

    Such a block, a convolution of a plain network, counts by what the norm behind it gives, as norms of a compressed
    network have other statistics than the original's. Nothing where norms are not called in the order of the blocks.
    """
    given: list[tuple[Tensor | None, str]] = []
    found: dict[str, str] = {}
    called: list[str] = []

    def keep(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            given.append((first_tensor(output), name))
            called.append(name)

        return note

    def take(norm: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            maker = next((name for tensor, name in given if args and tensor is args[0]), None)
            if maker is not None:
                found[maker] = norm
                called.remove(maker)
                called.append(maker)

        return note

    norms = [(name, one) for name, one in model.named_modules() if holds_statistics(one)]
    watched = [model.get_submodule(name).register_forward_hook(keep(name)) for name in blocks]
    with attached([*watched, *(one.register_forward_pre_hook(take(name)) for name, one in norms)]):
        run(model, inputs)
    return found if called == list(blocks) else {}


def _named(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The modules that some patterns match, none inside another."""
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if matches(name, pattern)}
        if not matched:
            raise UnknownNameError("block", pattern, names)
        found |= matched
    return {name for name in found if not any(name.startswith(f"{other}.") for other in found)}


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that a block gives, or the first that it does, where that is one of floating numbers."""
    found = next(iter(tensors_in(output)), None)
    return found if found is not None and found.is_floating_point() else None


def _rows(module: nn.Module, name: str, layers: Set[str]) -> Iterator[str]:
    """The names of what stands in rows, outermost first, that holds no more than half of the layers."""
    for part, child in module.named_children():
        path = f"{name}.{part}".lstrip(".")
        held = sum(f"{layer}.".startswith(f"{path}.") for layer in layers)
        if _is_row(child) or not _is_row(module) or 2 * held > max(len(layers), 2):
            yield from _rows(child, path, layers)
        elif held:
            yield path


def _is_row(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _calls(model: nn.Module, names: Set[str], inputs: Inputs) -> dict[str, list[tuple[Any, int]]]:
    """For every module, in the order of their first calls, the shapes that it gave and the bytes of each call."""
    found: dict[str, list[tuple[Any, int]]] = {}

    def see(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = first_tensor(output)
            if given is not None:
                size = sum(one.nbytes for one in tensors_in([*args, output]))
                found.setdefault(name, []).append((given.shape, size))

        return note

    with attached(model.get_submodule(name).register_forward_hook(see(name), with_kwargs=True) for name in names):
        run(model, inputs)
    return found
