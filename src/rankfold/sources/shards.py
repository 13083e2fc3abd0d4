"""Shards: the weights of a model as they lie in a directory of safetensors files, read tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankfold.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Shards:
    """A directory's tensors by name; nothing is read before it is asked for, and nothing is kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = dict(_files(directory))

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str) -> Tensor:
        """A tensor of the directory's."""
        with self._opened(name) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def size(self, name: str) -> tuple[int, int]:
        """The entries and the bytes of a tensor."""
        with self._opened(name) as file:
            return size_in(file, name)

    def fill_(self, module: nn.Module, prefix: str) -> None:
        """Gives a module its weights, and the buffers that are kept; raises ModelError for one that is not there."""
        wanted = [name for name in module.state_dict() if prefix + name in self or not self._tied(module, name)]
        state = {name: self.read(self._known(prefix + name)) for name in wanted}
        module.load_state_dict(state, strict=False, assign=True)

    def _known(self, name: str) -> str:
        if name not in self.files:
            raise ModelError(
                f"{self.directory} holds no {name}, which the model's class has; save the model with a transformers of "
                "this version first, so that names are the same"
            )
        return name

    def _tied(self, module: nn.Module, name: str) -> bool:
        """Whether a name is another one of a tensor that is there by a name of its own."""
        state = module.state_dict(keep_vars=True)
        return any(other is state[name] for key, other in state.items() if key != name)

    def _opened(self, name: str) -> Any:
        path = self.directory / self.files[self._known(name)]
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error


def _files(directory: Path) -> Iterator[tuple[str, str]]:
    """The tensors of a directory with the files that they are in."""
    index = directory / INDEX
    if index.is_file():
        try:
            yield from json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not an index of weights: {error}") from error
        return
    if not (directory / SINGLE).is_file():
        raise ModelError(f"{directory} holds neither {INDEX} nor {SINGLE}; weights are read from safetensors alone")
    try:
        with safe_open(directory / SINGLE, framework="pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory / SINGLE} cannot be read: {error}") from error
    yield from dict.fromkeys(names, SINGLE).items()


_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


def size_in(file: Any, name: str) -> tuple[int, int]:
    """The entries and the bytes of a tensor in an opened file of safetensors, by its header alone."""
    part = file.get_slice(name)
    entries = math.prod(part.get_shape())
    return entries, entries * _BYTES[part.get_dtype()]


def to_meta_(module: nn.Module) -> None:
    """Lets a module's tensors go, and keeps their shapes; buffers that are not saved stay."""
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                one._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, buffer in one._buffers.items():
            if buffer is not None and name not in one._non_persistent_buffers_set:
                one._buffers[name] = buffer.to(torch.device("meta"))
