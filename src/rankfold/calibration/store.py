"""Moments that are not in memory: each in a file that is read when it is used, or made of another at that time."""

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


class Stored(Mapping[str, Moment]):
    """Moments in files of a folder that goes with the last reference; the one that was read last stays at hand."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rankfold-moments-")
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
            self._last = (file, replace(self._rest[file], **cast(Any, load_file(self._path(file)))))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _written(self, moment: Moment) -> str:
        file, tensors = f"{len(self._rest)}.safetensors", _tensors(moment)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self._path(file))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"moments cannot be written to {self._folder.name} ({error}); set TMPDIR to a folder with room, or "
                "allow more memory"
            ) from error
        self._rest[file] = replace(moment, **cast(Any, dict.fromkeys(tensors)))
        return file

    def _path(self, file: str) -> Path:
        return Path(self._folder.name) / file


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
