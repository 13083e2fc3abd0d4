"""Tracing: what a pass does with layers, found by running it and not by names.

Which layers are called, and with what sizes; which modules read a weight past its layer; which batch norm takes all
that a layer gives; and how much a pass holds behind each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from rankfold.decompositions.wiring import Call
from rankfold.network.costs import unfused
from rankfold.network.hooks import attached, first_given
from rankfold.network.kinds import known_kind
from rankfold.network.passes import Inputs, run, tensors_in
from rankfold.network.stand_ins.recurrent import Recurrent

_TEMPLATES = ("aten::detach", "aten::alias", "aten::empty_like", "aten::zeros_like", "aten::ones_like", "aten::new_")
"""Operators that take a tensor's form, or another view of it, and not its numbers."""
_SUMS = ("aten::add.Tensor", "aten::add_.Tensor")
"""Operators that add tensors."""


@dataclass(frozen=True)
class Uses:
    """The calls of layers in a pass, and for those whose weight another module reads, which one does."""

    calls: Mapping[nn.Module, list[Call]]
    readers: Mapping[nn.Module, str] = field(default_factory=dict)


def uses(model: nn.Module, inputs: Inputs, layers: Sequence[nn.Module]) -> Uses:
    """What one pass over the inputs does with some layers."""
    names = {module: name for name, module in model.named_modules()}
    owners: dict[int, list[nn.Module]] = {}
    for layer in layers:
        owners.setdefault(id(layer.weight), []).append(layer)
    calls: dict[nn.Module, list[Call]] = {layer: [] for layer in layers}
    readers: dict[nn.Module, str] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        calls[module].append(_call(module, first_given(args, kwargs), output))

    def read(tensor: Tensor, running: Sequence[nn.Module]) -> None:
        if running and isinstance(running[-1], Recurrent):
            return  # its kernels take the weights of its layers, factors or not
        for owner in owners.get(id(tensor), ()):
            if not any(other in running for other in owners[id(tensor)]):
                readers[owner] = _named(names, running)

    with (
        unfused(),
        _operators(model, read),
        attached(layer.register_forward_hook(record, with_kwargs=True) for layer in layers),
    ):
        run(model, inputs)
    return Uses(calls, readers)


def followed(
    model: nn.Module, layers: Iterable[nn.Module], forward: Callable[[], object]
) -> tuple[list[nn.Module], dict[nn.Module, str]]:
    """The calls of some layers in a pass, in order, and for each the name of the batch norm that takes its output.

    `forward` runs the pass and returns what it gives. A batch norm is left out where it is called more than once,
    where it normalises another axis than that of the layer's outputs, and where anything else reads them too.
    """
    norms = {module: name for name, module in model.named_modules() if holds_statistics(module)}
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    order: list[nn.Module] = []
    takers: dict[nn.Module, list[nn.Module | None]] = {}
    shared: set[nn.Module] = set()

    def given(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        order.append(module)
        if isinstance(output, Tensor):
            outputs[id(output)] = (module, output)

    def taken(module: nn.Module, args: tuple[Any, ...]) -> None:
        giver = outputs.get(id(args[0])) if args else None
        fits = giver is not None and _along_outputs(module, *giver)
        takers.setdefault(module, []).append(cast(Any, giver)[0] if fits else None)

    def read(tensor: Tensor, running: Sequence[nn.Module]) -> None:
        if id(tensor) in outputs and not (running and running[-1] in norms):
            shared.add(outputs[id(tensor)][0])

    hooks = [layer.register_forward_hook(given) for layer in layers]
    hooks += [norm.register_forward_pre_hook(taken) for norm in norms]
    with _operators(model, read), attached(hooks):
        final = forward()
    shared.update(outputs[id(one)][0] for one in tensors_in(final) if id(one) in outputs)
    followers = {
        givers[0]: norms[norm]
        for norm, givers in takers.items()
        if len(givers) == 1 and givers[0] is not None and givers[0] not in shared
    }
    return order, followers


def held_behind(modules: Iterable[nn.Module], forward: Callable[[], object]) -> dict[nn.Module, int]:
    """Bytes of what a pass has made that it holds once some modules were called, the most of all their calls."""
    made: dict[int, tuple[StorageWeakRef, int]] = {}
    held: dict[nn.Module, int] = {}

    def note(storage: UntypedStorage) -> None:
        made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def weigh(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for gone in [key for key, (storage, _) in made.items() if storage.expired()]:
            del made[gone]
        held[module] = max(held.get(module, 0), sum(size for _, size in made.values()))

    with Operands(made=note), attached(module.register_forward_hook(weigh) for module in modules):
        forward()
    return held


def holds_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm with a mean and variance of its own, and not of every batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def gives_channels(module: nn.Module, axes: int) -> bool:
    """Whether a module may give (examples, channels, places…) with so many axes of places, not features last."""
    return any(
        isinstance(one, nn.modules.batchnorm._BatchNorm)
        or (isinstance(one, nn.modules.conv._ConvNd) and len(one.kernel_size) == axes)
        for one in module.modules()
    )


def _call(module: nn.Module, given: Any, output: Tensor) -> Call:
    """One call of a layer."""
    kind = known_kind(module)
    if kind.axes == 0:
        return Call(batch=output[..., 0].numel(), lookup=kind.lookup)
    batch = given.shape[0] if given.ndim == kind.axes + 2 else 1
    return Call(batch, tuple(given.shape[-kind.axes :]), tuple(output.shape[-kind.axes :]))


def _named(names: Mapping[nn.Module, str], running: Sequence[nn.Module]) -> str:
    """The innermost module that runs, in words."""
    module = next((one for one in reversed(running) if one in names), None)
    if module is None or not names[module]:
        return "the model"
    return f"{names[module]} ({type(module).__name__})"


def _along_outputs(norm: nn.Module, layer: nn.Module, output: Tensor) -> bool:
    """Whether a batch norm normalises the axis of a layer's outputs."""
    return output.ndim == known_kind(layer).axes + 2 and cast(Any, norm).num_features == output.shape[1]


@contextmanager
def _operators(model: nn.Module, read: Callable[[Tensor, Sequence[nn.Module]], None]) -> Iterator[None]:
    """Tells of every tensor that an operator reads, with the modules that run, innermost last."""
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        running.append(module)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while running and running.pop() is not module:
            pass

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    with attached(hooks), Operands(read=lambda tensor: read(tensor, running)):
        yield


class Operands(TorchDispatchMode):
    """Calls functions with every tensor that an operator takes, and with the memory that it makes for what it gives.

    With two tensors of one shape, too, before they are added.
    """

    def __init__(
        self,
        *,
        read: Callable[[Tensor], None] | None = None,
        made: Callable[[UntypedStorage], None] | None = None,
        added: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.read, self.made, self.added = read, made, added

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see `costs`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = tensors_in([*args, *(kwargs or {}).values()])
        if self.read is not None and not func.name().startswith(_TEMPLATES):
            for tensor in taken:
                self.read(tensor)
        if self.added is not None and func.name() in _SUMS and not kwargs:
            shapes = [one.shape for one in taken]
            if len(shapes) == 2 and shapes[0] == shapes[1]:
                self.added(*taken)
        output = func(*args, **(kwargs or {}))
        if self.made is not None:
            known = {tensor.untyped_storage()._cdata for tensor in taken}
            for storage in (tensor.untyped_storage() for tensor in tensors_in(output)):
                if storage._cdata not in known:
                    self.made(storage)
        return output
