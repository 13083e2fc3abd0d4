"""Records: frozen dataclasses of numbers, texts and arrays in a file of safetensors, and back. Nothing is unpickled."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankfold.errors import ArtifactError


def write_record(path: Path, record: Any) -> None:
    """Puts a record in its place in one step."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encoded(record, tensors))
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        save_file(tensors, partial, metadata={"record": text})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_record(path: Path, kinds: Mapping[str, type]) -> Any:
    """The record in a file, made of these kinds of dataclasses, by name; raises ArtifactError for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
            return _decoded(json.loads((file.metadata() or {})["record"]), tensors, kinds)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); remove it, and it is made again") from error


def _encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value in JSON's types; arrays go to `tensors`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (np.ndarray, Tensor)):
        name = str(len(tensors))
        tensors[name] = value.contiguous().clone() if isinstance(value, Tensor) else torch.from_numpy(value.copy())
        return {"tensor" if isinstance(value, Tensor) else "array": name}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_encoded(one, tensors) for one in value]}
    if isinstance(value, Mapping):
        return {"mapping": [[_encoded(key, tensors), _encoded(one, tensors)] for key, one in value.items()]}
    if is_dataclass(value):
        held = {one.name: _encoded(getattr(value, one.name), tensors) for one in fields(value) if one.init}
        return {"record": type(value).__name__, "fields": held}
    raise TypeError(f"{type(value).__name__} is no number, text, array or record")


def _decoded(value: Any, tensors: Mapping[str, Tensor], kinds: Mapping[str, type]) -> Any:
    if not isinstance(value, dict):
        return value
    if "record" in value:
        held = {name: _decoded(one, tensors, kinds) for name, one in value["fields"].items()}
        return kinds[value["record"]](**held)
    ((form, content),) = value.items()
    if form == "tensor":
        return tensors[content]
    if form == "array":
        return tensors[content].numpy()
    if form == "mapping":
        return {_decoded(key, tensors, kinds): _decoded(one, tensors, kinds) for key, one in content}
    parts = [_decoded(one, tensors, kinds) for one in content]
    return cast(Any, {"tuple": tuple, "list": list}[form])(parts)
