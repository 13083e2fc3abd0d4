"""Labelled inputs for evaluation: arrays in an .npz file, a folder of images per class, or a function of the user's."""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rankfold.errors import DataError

_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per channel, applied to inputs in [0, 1]; `source` says where they come from."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str = "given"


@dataclass(frozen=True)
class Dataset:
    """Inputs and labels, turned into model inputs batch by batch.

    Integer inputs are images in 0…255: they are scaled to [0, 1] and normalised. Floating inputs are taken as they
    are, unless `normalise_floats`. `x` may have its channels last, or none at all; the model takes `input_shape`.
    """

    x: npt.NDArray[Any] | Sequence[Path]
    y: npt.NDArray[np.int64]
    input_shape: tuple[int, ...]
    normalisation: Normalisation
    normalise_floats: bool = False

    def __len__(self) -> int:
        return len(self.y)

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return int(self.y.max()) + 1

    @property
    def black(self) -> Tensor:
        """What a black pixel is to the model, per channel: zero where inputs are taken as they are."""
        scaled = not isinstance(self.x, np.ndarray) or not np.issubdtype(self.x.dtype, np.floating)
        if not scaled and not self.normalise_floats:
            return torch.zeros(self.input_shape[0])
        return -torch.tensor(self.normalisation.mean) / torch.tensor(self.normalisation.std)

    def sample(self, count: int) -> Dataset:
        """At most `count` of the examples, evenly spaced: every n-th from the first on."""
        return self.take(range(0, len(self), max(1, len(self) // count))[:count])

    def take(self, places: Sequence[int]) -> Dataset:
        """The examples at these places."""
        chosen = list(places)
        x = self.x[chosen] if isinstance(self.x, np.ndarray) else [self.x[k] for k in chosen]
        return replace(self, x=x, y=self.y[chosen])

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Inputs, float32 of shape (n, *input_shape), and labels (n,)."""
        chosen = self.x[start:stop]
        raw = chosen if isinstance(chosen, np.ndarray) else np.stack([_read_image(p, self.input_shape) for p in chosen])
        x = torch.from_numpy(np.ascontiguousarray(_channels_first(raw, self.input_shape)))
        floating = x.is_floating_point()
        x = x.float() if floating else x.float() / 255
        if not floating or self.normalise_floats:
            shape = (-1, *[1] * (x.ndim - 2))
            x = (x - torch.tensor(self.normalisation.mean).reshape(shape)) / torch.tensor(
                self.normalisation.std
            ).reshape(shape)
        return x, torch.from_numpy(self.y[start:stop])


def open_dataset(
    spec: str, input_shape: tuple[int, ...], normalisation: Normalisation, *, normalise_floats: bool = False
) -> Dataset:
    """The data that `spec` names: npz:PATH (arrays x and y), imagefolder:DIR, or module:factory returning (x, y).

    Raises DataError for what cannot be read, or does not fit the input shape or the normalisation.
    """
    kind, separator, rest = spec.partition(":")
    if not separator or not rest:
        raise DataError(f"data {spec!r} is not of the form npz:PATH, imagefolder:DIR or module:factory")
    x: npt.NDArray[Any] | list[Path]
    if kind == "npz":
        x, y = _read_npz(Path(rest))
    elif kind == "imagefolder":
        x, y = _list_images(Path(rest))
    else:
        x, y = _call_factory(kind, rest)
    labels = np.asarray(y)
    if labels.ndim != 1 or len(labels) != len(x) or len(labels) == 0:
        raise DataError(f"{spec}: needs one label per input and at least one input; x has {len(x)}, y {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(f"{spec}: y must hold class indices, integers from 0 on; it has dtype {labels.dtype}")
    channels = input_shape[0]
    for name, values in (("mean", normalisation.mean), ("std", normalisation.std)):
        if len(values) not in (1, channels):
            raise DataError(f"the {name} has {len(values)} values, the model takes {channels} channels")
    if isinstance(x, np.ndarray):
        _channels_first(x[:1], input_shape)
    return Dataset(x, labels.astype(np.int64), input_shape, normalisation, normalise_floats)


def _read_npz(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in ("x", "y") if name not in arrays]
            if missing:
                raise DataError(f"{path} lacks the array {missing[0]!r}; it holds {', '.join(arrays.files) or 'none'}")
            return arrays["x"], arrays["y"]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} is not a readable .npz file: {error}") from error


def _list_images(folder: Path) -> tuple[list[Path], npt.NDArray[np.int64]]:
    """Image paths and labels of a folder with one subfolder per class, classes in the order of their names."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a directory")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    pairs = [
        (path, label)
        for label, entry in enumerate(classes)
        for path in sorted(entry.iterdir())
        if path.suffix.lower() in _IMAGES
    ]
    if not pairs:
        raise DataError(f"{folder} holds no images in class folders ({', '.join(sorted(_IMAGES))})")
    return [path for path, _ in pairs], np.array([label for _, label in pairs])


def _call_factory(module: str, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    try:
        made = getattr(importlib.import_module(module), name)()
        x, y = made
    except (ImportError, AttributeError) as error:
        raise DataError(f"data {module}:{name}: {error}") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"data {module}:{name} must return a pair (x, y): {error}") from error
    return np.asarray(x), np.asarray(y)


def _read_image(path: Path, input_shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """One image as (height, width, channels): the shorter side resized, the centre cropped."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading images needs Pillow: pip install 'rankfold[images]'") from error
    channels, height, width = input_shape
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except OSError as error:
        raise DataError(f"{path} is not a readable image: {error}") from error
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return pixels[:, :, None] if channels == 1 else pixels


def _channels_first(x: npt.NDArray[Any], input_shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The inputs as (n, *input_shape); raises DataError where their shape is no layout of it."""
    given = x.shape[1:]
    if given == input_shape:
        return x
    if given == (*input_shape[1:], input_shape[0]):
        return np.moveaxis(x, -1, 1)
    if input_shape[0] == 1 and given == input_shape[1:]:
        return x[:, None]
    raise DataError(f"x holds inputs of shape {given}, the model takes {input_shape} (channels first or last)")
