"""What is not kept in memory: tensors in files, and moments that are read, or made of others, when they are used."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankfold.decompositions.metric import Moment
from rankfold.errors import ArtifactError


class TensorFiles:
    """Tensors in files of a folder that goes with the last reference; `what` they are names it."""

    def __init__(self, what: str) -> None:
        self._what, self._folder = what, tempfile.TemporaryDirectory(prefix=f"rankfold-{what}-")

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes a file of tensors; raises ArtifactError where there is no room for them."""
        try:
            save_file({one: tensor.contiguous() for one, tensor in tensors.items()}, self._path(name))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{self._what} cannot be written to {self._folder.name} ({error}); set TMPDIR to a folder with room, "
                "or allow more memory"
            ) from error

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file."""
        return load_file(self._path(name))

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.safetensors"


class Stored(Mapping[str, Moment]):
    """Moments in files; the one that was read last stays at hand."""

    def __init__(self) -> None:
        self._kept = TensorFiles("moments")
        self._files: dict[str, str] = {}
        self._rest: dict[str, Moment] = {}
        self._last: tuple[str, Moment] = ("", Moment())

    def update(self, named: Mapping[str, Moment]) -> None:
        """Writes moments to files, one for all names of one."""
        files: dict[int, str] = {}
        for name, moment in named.items():
            if id(moment) not in files:
                files[id(moment)] = self._written(moment)
            self._files[name] = files[id(moment)]

    def __getitem__(self, name: str) -> Moment:
        file = self._files[name]
        if self._last[0] != file:
            self._last = (file, replace(self._rest[file], **cast(Any, self._kept.read(file))))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _written(self, moment: Moment) -> str:
        file, tensors = str(len(self._rest)), _tensors(moment)
        self._kept.write(file, tensors)
        self._rest[file] = replace(moment, **cast(Any, dict.fromkeys(tensors)))
        return file


class Changed(Mapping[str, Moment]):
    """Other moments as a function makes them of their names and themselves, each when it is used."""

    def __init__(self, moments: Mapping[str, Moment], change: Callable[[str, Moment], Moment]) -> None:
        self._moments, self._change = moments, change

    def __getitem__(self, name: str) -> Moment:
        return self._change(name, self._moments[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)


def _tensors(moment: Moment) -> dict[str, Tensor]:
    """What of a moment is kept in a file, by field."""
    values = {one.name: getattr(moment, one.name) for one in fields(moment)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
