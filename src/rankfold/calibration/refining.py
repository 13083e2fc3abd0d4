"""Refining block by block: gradient descent on a block's weights, in forward order, towards what the original's gives.

Least squares fits layers one by one, and what a nonlinearity, a norm or a residual connection makes of their errors is
not in it. Here a whole block of the compressed network gets what the blocks before it, refined already, pass on, and
is to give what the original's block gives on the original's own inputs (AdaRound and BRECQ, arXiv 2004.10568 and
2102.05426, do so for quantised blocks). Every position of every input is a target, so that a few hundred inputs are
many examples: on DeiT-Tiny at 70 % of its MACs and 300 images agreement with the original rises from 62 to 76 %, where
descent on the outputs of the whole network gains 6 points and then overfits. No labels are used.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankfold.calibration.in_step import most_waiting
from rankfold.calibration.moments import forward_batch
from rankfold.calibration.positions import position_weights, weighted_square
from rankfold.calibration.walks import walking
from rankfold.errors import ArtifactError, BudgetError
from rankfold.memory import trim
from rankfold.network.blocks import WithNorm, find_blocks, first_tensor, norms_behind
from rankfold.network.passes import Inputs, copied, digest_of, evaluating, few, split
from rankfold.plan import Plan
from rankfold.progress import Progress, silent
from rankfold.sharing import owned

RATE, BACK = 1e-3, 3.0
"""Adam's learning rate, and what it is divided by after an epoch that made the error on held inputs rise."""
MOMENTA = (0.9, 0.99)
"""Adam's weights of past gradients and squares."""
BATCH = 20
"""Inputs in a step, at most, unless said otherwise."""
HELD = 2
"""How many times as much a pass that waits at a block holds, about, as the block takes and gives."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with, by position and by name."""
Choice = Callable[[Sequence[Tensor], Callable[[], float]], None]
"""What writes other values into some tensors where an error is lower with them, or leaves them as they are."""


@dataclass(frozen=True)
class Refining:
    """How blocks are refined: in so many `epochs`, passes over the inputs, in steps of `batch_size` inputs at most.

    `blocks` are patterns of the names of modules that are refined; without any they are found. A block is to give what
    the original's gives on the original's own inputs, but for the share `mixed`, in which it is to give what the
    original's gives on the inputs that it has itself. With `checkpoint`, a folder, every block is kept there once it is
    done, and the same run goes on from the last one. Besides the inputs it goes over so many `copies` of each, which
    are images, shifted by a few pixels and mirrored.
    """

    epochs: int
    blocks: tuple[str, ...] = ()
    mixed: float = 0.0
    batch_size: int = BATCH
    copies: int = 0
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if min(self.epochs, self.copies) < 0 or self.batch_size < 1:
            raise BudgetError(
                f"refining takes a number of epochs and of copies, 0 for none, and of inputs in a step, at least 1, "
                f"not {self.epochs}, {self.copies} and {self.batch_size}"
            )
        if self.checkpoint is not None and self.checkpoint.is_file():
            raise ArtifactError(f"{self.checkpoint} is a file; a checkpoint of refining is a folder")
        if not 0 <= self.mixed <= 1:
            raise BudgetError(f"the share of mixed targets is from 0 to 1, not {self.mixed}")

    def as_dict(self) -> dict[str, Any]:
        """What a plan says of it: the epochs, and what else is not as usual."""
        told = {name: getattr(self, name) for name in ("mixed", "batch_size", "copies")} | {"blocks": list(self.blocks)}
        changed = [name for name in told if getattr(self, name) != getattr(Refining, name)]
        return {"refine_epochs": self.epochs, **{f"refine_{name}": told[name] for name in changed}}


@dataclass(frozen=True)
class Refined:
    """A block and its squared relative error on held inputs before and after it was refined."""

    name: str
    before: float
    after: float


def refine_(
    student: nn.Module,
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Inputs],
    held: Iterable[Inputs],
    *,
    refining: Refining,
    begun: Choice | None = None,
    progress: Progress = silent,
) -> list[Refined]:
    """Refines the student's blocks in place; one stays as it was where its error on `held` inputs does not fall.

    `student` is the model as `plan` compressed it. An epoch is a pass over `batches`; where memory does not hold what
    goes into an early block, some are left out there. `begun` chooses what a block begins with, by its error on `held`
    inputs. Deterministic. Raises DataError for batches that do not fit the model, ModelError for given blocks that
    cannot be looked at alone, ArtifactError for a checkpoint of another run.
    """
    judged, seen = split(held, refining.batch_size), split(batches, refining.batch_size)
    if not (refining.epochs and seen and judged):
        return []
    blocks = find_blocks(model, student, seen[0], plan.touched, given=refining.blocks)
    both, found = [*judged, *seen], []
    behind = norms_behind(model, list(blocks), few(seen, 1)[0])
    ends = {behind.get(name, name): size for name, size in blocks.items()}
    weights = position_weights(model, ends, batches)
    kept = _Kept.opened(refining, plan, both)
    theirs, own = _walks(model, ends, both), _walks(student, blocks, both, arguments=True)
    with evaluating(model), evaluating(student), theirs as originals, own as walks:
        for place, (name, most) in enumerate(most_waiting({one: HELD * size for one, size in blocks.items()}).items()):
            progress("refining blocks", place, len(blocks))
            pairs = list(zip(originals, walks, strict=True))[: max(most, len(judged) + 1)]
            calls = [(theirs_at.to(place), walk.to(place)) for theirs_at, walk in pairs]
            module, original = (_whole(one, name, behind.get(name)) for one in (student, model))
            wanted = [first_tensor(one) for one, _ in calls]
            if all(one is not None for one in wanted):
                inputs, own_parameters = [call for _, call in calls], _own(student, module)
                state = [*own_parameters, *module.buffers()]
                done = kept.read_(place, state)
                if done is None:
                    targets = _mixed(original, inputs, cast("list[Tensor]", wanted), refining.mixed)
                    examples = _Examples(inputs, targets, len(judged), weights.get(behind.get(name, name)))
                    if begun is not None:
                        begun(state, partial(examples.error, module))
                    done = _descended(module, own_parameters, examples, refining.epochs)
                    kept.write(place, state, done)
                found.append(Refined(name, *done))
            trim()
    progress("refining blocks", len(blocks), len(blocks))
    return found


def _whole(model: nn.Module, name: str, norm: str | None) -> nn.Module:
    """A block, with the norm behind it where there is one."""
    block = model.get_submodule(name)
    return WithNorm(block, model.get_submodule(norm)) if norm else block


def _walks(model: nn.Module, blocks: Mapping[str, int], batches: Sequence[Inputs], *, arguments: bool = False) -> Any:
    """Walks that stop at what goes into the blocks, or comes out of them."""
    stops = {model.get_submodule(name): place for place, name in enumerate(blocks)}
    return walking(model, stops, partial(forward_batch, model), batches, outputs=not arguments, arguments=arguments)


@torch.no_grad()
def _mixed(module: nn.Module, inputs: list[Call], wanted: list[Tensor], share: float) -> list[Tensor]:
    """Targets: what the original's block gives on its own inputs, and for a share what it gives on some others.

    Where these lost channels the original's block cannot take them, and its own inputs are all that counts.
    """
    found = []
    for call, target in zip(inputs, wanted, strict=True) if share else ():
        args, kwargs = _fresh(call)
        try:
            given = cast(Tensor, first_tensor(module(*args, **kwargs)))
        except RuntimeError:
            return wanted
        found.append((1 - share) * target + share * given)
    return found or wanted


@dataclass(frozen=True)
class _Kept:
    """Blocks that are done, in a folder, by their places; nothing, where there is none. `run` tells runs apart."""

    folder: Path | None
    run: str

    @classmethod
    def opened(cls, refining: Refining, plan: Plan, batches: Iterable[Inputs]) -> _Kept:
        """The blocks in a checkpoint's folder, which is made where it is not there."""
        if refining.checkpoint is None:
            return cls(None, "")
        layers = [(one.name, one.decomposition, one.ranks, one.narrowed, one.error) for one in plan.layers]
        gone = [(one.channels.name, one.kept) for one in plan.narrowings]
        told = repr((replace(refining, checkpoint=None), layers, gone, digest_of(batches)))
        try:
            refining.checkpoint.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"{refining.checkpoint} cannot be a checkpoint's folder: {error.strerror}") from error
        return cls(refining.checkpoint, hashlib.sha256(told.encode()).hexdigest())

    def read_(self, place: int, state: Sequence[Tensor]) -> tuple[float, float] | None:
        """Writes what a block became into its tensors, and returns its errors before and after, if it is done."""
        if self.folder is None or not self._file(place).is_file():
            return None
        try:
            with safe_open(self._file(place), framework="pt") as file:
                told = file.metadata() or {}
                values = [file.get_tensor(str(k)) for k in range(len(state))] if told["run"] == self.run else None
                before, after = float(told["before"]), float(told["after"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(f"{self._file(place)} cannot be read ({error}); remove it") from error
        if values is None:
            raise ArtifactError(f"{self.folder} is the checkpoint of another run; remove it, or give another folder")
        _write_(state, values)
        return before, after

    def write(self, place: int, state: Sequence[Tensor], errors: tuple[float, float]) -> None:
        """Keeps a block; of several processes, which all do the same, one writes."""
        if self.folder is None or not owned(0):
            return
        told = {"run": self.run, "before": repr(errors[0]), "after": repr(errors[1])}
        partial = self._file(place).with_suffix(".partial")
        try:
            save_file({str(k): one.detach().clone() for k, one in enumerate(state)}, partial, metadata=told)
            partial.replace(self._file(place))
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise ArtifactError(f"cannot write {self._file(place)}: {error}; the blocks before it are kept") from error

    def _file(self, place: int) -> Path:
        return cast(Path, self.folder) / f"block-{place:05d}.safetensors"


@dataclass(frozen=True)
class _Examples:
    """What a block is called with, and is to give, batch by batch; the first ones, some that are `held`, judge it.

    `weights` are those of the places of what it gives, where they count unequally.
    """

    calls: list[Call]
    wanted: list[Tensor]
    held: int
    weights: Tensor | None = None

    @property
    def seen(self) -> range:
        """The places of the batches that are not held."""
        return range(self.held, len(self.calls))

    def error(self, module: nn.Module) -> float:
        """The squared relative error over the held batches."""
        with torch.no_grad():
            lost = sum(float(self.lost(module, place)) for place in range(self.held))
        return lost / max(self.energy(range(self.held)), 1e-30)

    def energy(self, places: range) -> float:
        """The square of what the block is to give, over some batches."""
        return sum(float(weighted_square(self.wanted[place], self.weights)) for place in places)

    def lost(self, module: nn.Module, place: int) -> Tensor:
        """The squared error of a batch, differentiable in the module's parameters."""
        args, kwargs = _fresh(self.calls[place])
        output = cast(Tensor, first_tensor(module(*args, **kwargs)))
        return weighted_square((output - self.wanted[place]).float(), self.weights)


def _descended(
    module: nn.Module, parameters: list[nn.Parameter], examples: _Examples, epochs: int
) -> tuple[float, float]:
    """A block's error on held batches before and after descent; its weights are those with the least."""
    seen = examples.seen
    before = best = examples.error(module)
    if not parameters or not math.isfinite(before):
        return before, before
    kept = [parameter.detach().clone() for parameter in parameters]
    flags = [parameter.requires_grad for parameter in parameters]
    scale = examples.energy(seen) / len(seen)
    optimiser = torch.optim.Adam([parameter.requires_grad_() for parameter in parameters], betas=MOMENTA)
    generator, rate, total = torch.Generator().manual_seed(0), RATE, epochs * len(seen)
    for epoch in range(epochs):
        for step, chosen in enumerate(torch.randperm(len(seen), generator=generator).tolist(), epoch * len(seen)):
            optimiser.param_groups[0]["lr"] = (
                rate * min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * step / total)) / 2
            )
            with torch.enable_grad():
                loss = examples.lost(module, seen[chosen]) / max(scale, 1e-30)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
        now = examples.error(module)
        if now < best:
            best, kept = now, [parameter.detach().clone() for parameter in parameters]
        else:
            rate /= BACK
            _write_(parameters, kept)
            optimiser.state.clear()
    _write_(parameters, kept)
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.grad = None
        parameter.requires_grad_(flag)
    return before, best


def _own(model: nn.Module, module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that no other part of the model has, in a type that takes small steps."""
    inside = set(module.modules())
    shared = {one for part in model.modules() if part not in inside for one in part.parameters(recurse=False)}
    return [one for one in module.parameters() if one not in shared and one.dtype in (torch.float32, torch.float64)]


def _write_(state: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(state, values, strict=True):
        tensor.data.copy_(value)


def _fresh(call: Call) -> Call:
    """What a module is called with, for it to change: tensors, and what else it may write to, such as caches."""
    args, kwargs = call
    return tuple(map(_own_copy, args)), {name: _own_copy(value) for name, value in kwargs.items()}


def _own_copy(value: Any) -> Any:
    return copied(value) if isinstance(value, (Tensor, Mapping, tuple, list)) else copy.deepcopy(value)
