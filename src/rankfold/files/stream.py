"""What reaches the blocks of a model that is in no memory: its network without weights, and what enters its row.

The row of blocks is the list of modules that holds most of the model. A pass in which blocks note what they are given,
and hand it on, tells what each of them is called with beside the hidden states, whatever the architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import ModelError, reason_of
from rankfold.network.blocks import first_tensor
from rankfold.network.passes import Inputs, arguments_of, describe_inputs, run
from rankfold.sources.hugging_face import quiet, vocabulary_of
from rankfold.sources.models import optional
from rankfold.sources.shards import Shards, to_meta_

RANDOM = (16, 256)
"""Rows and tokens of what is drawn at random, where nothing is given to calibrate on."""
IN_PASS = 4
"""Rows in a pass."""


@dataclass(frozen=True)
class Stream:
    """What reaches a row of blocks: for every batch the hidden states, and what else each block is given with them."""

    name: str
    hidden: list[Tensor]
    others: list[list[dict[str, Any]]]

    def at(self, block: int) -> list[Inputs]:
        """What a block is called with."""
        pairs = zip(self.hidden, self.others, strict=True)
        return [{self.name: hidden, **others[block]} for hidden, others in pairs]

    def behind(self, block: nn.Module, number: int) -> Stream:
        """The stream once it has passed a block."""
        return replace(self, hidden=[first_of(run(block, inputs)) for inputs in self.at(number)])


def skeleton(directory: Path) -> Any:
    """The model that a directory's configuration describes, its parameters without numbers."""
    transformers, accelerate = optional("transformers", "hf"), optional("accelerate", "train")
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} holds no config.json; give a directory that transformers saved a model in")
    with quiet(transformers), accelerate.init_empty_weights(include_buffers=False):
        try:
            config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
            kind = getattr(transformers, (config.architectures or [""])[0], None)
            model = kind._from_config(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
        except Exception as error:
            raise ModelError(f"{directory} describes no model of transformers: {reason_of(error)}") from error
    model.tie_weights()
    return model.eval()


def row_of(model: nn.Module) -> str:
    """The name of the row of blocks that holds most of a model's parameters; raises ModelError where there is none."""
    rows = {
        name: sum(one.numel() for one in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(one) for one in module}) == 1
    }
    best = max(rows, key=lambda name: rows[name], default=None)
    if best is None or 2 * rows[best] < sum(one.numel() for one in model.parameters()) - _largest(model):
        raise ModelError(f"{type(model).__name__} is no row of blocks of one kind; load it and use rankfold.compress")
    return best


def _largest(model: nn.Module) -> int:
    """The entries of a model's embedding and head, which are in no block."""
    ends = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    return sum(one.weight.numel() for one in ends if one is not None)


def batches_for(model: Any, calibration: Iterable[Any] | None) -> list[dict[str, Any]]:
    """What the model is called with, in passes of a few rows, without a cache."""
    if calibration is None:
        size = vocabulary_of(model)
        if size is None:
            raise ModelError("the model takes no tokens; give calibration inputs")
        rows = torch.randint(size, RANDOM, generator=torch.Generator().manual_seed(0))
        calibration = rows.split(IN_PASS)
    named = model.main_input_name
    cached = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
    found = [{**(one if isinstance(one, dict) else {named: one}), **cached} for one in calibration]
    if not found:
        raise ModelError("the calibration inputs are empty; give at least one batch of tokens")
    return found


def entering(model: Any, shards: Shards, row: str, blocks: Sequence[nn.Module], batches: Sequence[Any]) -> Stream:
    """What enters a row of blocks, told by a pass in which blocks note what they are given and hand it on."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in shards:
            names.setdefault(id(parameter), name)
    for name, module in model.named_modules():
        own = [*module._parameters, *(one for one in module._buffers if one not in module._non_persistent_buffers_set)]
        if own and not f"{name}.".startswith(f"{row}.") and module is not head:
            _fill_own_(module, shards, name, names)
    reason = ""
    for wrapped in (False, True):
        try:
            found = [_noted(model, blocks, batch, wrapped=wrapped) for batch in batches]
            break
        except _NotARow as error:
            reason = str(error)
    else:
        raise ModelError(f"the blocks of {row} are not called one after another: {reason}")
    to_meta_(model)
    return Stream(found[0][0], [hidden for _, hidden, _ in found], [others for _, _, others in found])


class _NotARow(Exception):  # noqa: N818
    """Blocks were called in another way than one after another."""


def _noted(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Inputs, *, wrapped: bool
) -> tuple[str, Tensor, list[dict[str, Any]]]:
    """The name of what blocks hand on, what enters the first, and what else each is given."""
    seen: list[tuple[str, Tensor, dict[str, Any]]] = []

    def note(number: int, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
        if number != len(seen):
            raise _NotARow(f"block {number} was called where block {len(seen)} was to be")
        name, hidden, others = _named(signature, args, kwargs)
        if seen and hidden is not seen[-1][1]:
            raise _NotARow(f"block {number} is not given what block {number - 1} gives")
        seen.append((name, hidden, others))
        if len(seen) == len(blocks):
            raise _Enough
        return (hidden,) if wrapped else hidden

    for number, block in enumerate(blocks):
        block.forward = partial(note, number, inspect.signature(block.forward))
    try:
        args, kwargs = arguments_of(batch)
        model(*args, **kwargs)
    except _Enough:
        pass
    except _NotARow:
        raise
    except Exception as error:
        raise ModelError(f"the model does not run on {describe_inputs(batch)}: {reason_of(error)}") from error
    finally:
        for block in blocks:
            del block.forward
    if len(seen) < len(blocks):
        raise _NotARow(f"{len(seen)} of {len(blocks)} blocks were called")
    return seen[0][0], seen[0][1].detach(), [others for _, _, others in seen]


def _named(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any, dict[str, Any]]:
    """The name of a call's first argument, what it is, and all other arguments by name."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    name, first = next(iter(given.items()))
    return name, first, {key: value for key, value in given.items() if key != name}


class _Enough(BaseException):
    """All blocks have been seen; not an Exception, so that no model catches it."""


def _fill_own_(module: nn.Module, shards: Shards, prefix: str, names: Mapping[int, str]) -> None:
    """Gives a module the tensors that are its own, not those of modules in it; by their `names` in the files."""
    for name, parameter in [*module._parameters.items()]:
        if parameter is not None:
            known = names.get(id(parameter), f"{prefix}.{name}".lstrip("."))
            module._parameters[name] = nn.Parameter(shards.read(known), requires_grad=False)
    for name, buffer in module._buffers.items():
        key = f"{prefix}.{name}".lstrip(".")
        if buffer is not None and name not in module._non_persistent_buffers_set and key in shards:
            module._buffers[name] = shards.read(key)


def first_of(output: Any) -> Tensor:
    """What a block hands on; raises ModelError where that is no tensor of floating numbers."""
    found = first_tensor(output)
    if found is None:
        raise ModelError("a block gives no tensor of floating numbers to the next one")
    return found
