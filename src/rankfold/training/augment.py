"""Augmentations on whole batches of images in one tensor: fast enough that training never waits for them.

Each is a function of a batch (n, c, h, w), the value of black per channel, and a generator that every draw comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from rankfold.errors import DataError, UnknownNameError
from rankfold.network.passes import Inputs

Augmentation = Callable[[Tensor, Tensor, torch.Generator], Tensor]

PADDING, MARGIN = 4, 8
"""Pixels around a small image before it is cropped (He et al., arXiv 1512.03385, section 4.2), but no more than one for
so many pixels of its side, so that as much of it is left where it is smaller than theirs."""
SMALLEST, LARGEST_RATIO = 0.08, 4 / 3
"""Smallest share of the area and largest ratio of the sides of a crop (Szegedy et al., arXiv 1409.4842, section 6)."""


def none(
    x: Float[Tensor, "n c h w"], black: Float[Tensor, " c"], generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """The images as they are."""
    return x


def cifar(
    x: Float[Tensor, "n c h w"], black: Float[Tensor, " c"], generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """Each image padded with black, cropped to its size at a random place, and mirrored or not."""
    n, _, height, width = x.shape
    shade = black.reshape(1, -1, 1, 1)
    padding = min(PADDING, min(height, width) // MARGIN)
    padded = functional.pad(x - shade, [padding] * 4) + shade
    down, right = (torch.randint(0, 2 * padding + 1, (n, 1), generator=generator) for _ in range(2))
    columns = torch.arange(width).expand(n, -1)
    columns = torch.where(_coin(n, generator)[:, None], columns.flip(1), columns) + right
    rows = torch.arange(height) + down
    picked = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def imagenet(
    x: Float[Tensor, "n c h w"], black: Float[Tensor, " c"], generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """A crop of random area, shape and place of each image, resized to its size, and mirrored or not."""
    n = len(x)
    area = SMALLEST + (1 - SMALLEST) * torch.rand(n, generator=generator)
    ratio = ((2 * torch.rand(n, generator=generator) - 1) * math.log(LARGEST_RATIO)).exp()
    wide, high = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    places = 2 * torch.rand(n, 2, generator=generator) - 1
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = torch.where(_coin(n, generator), -wide, wide)
    theta[:, 1, 1] = high
    theta[:, :, 2] = places * torch.stack([1 - wide, 1 - high], 1)
    grid = functional.affine_grid(theta, list(x.shape), align_corners=False).to(x.device, x.dtype)
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def boxes_of_others(x: Float[Tensor, "n c h w"], share: float, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """In a share of all batches, the images with a box in each that is another's (Yun et al., arXiv 1905.04899).

    The box has any share of the area, evenly, the shape of the image and the same place in all (there section 3.1).
    """
    chosen, area = torch.rand(2, generator=generator).tolist()
    if chosen >= share:
        return x
    sides = [int(size * math.sqrt(area)) for size in x.shape[2:]]
    spare = [size - side + 1 for size, side in zip(x.shape[2:], sides, strict=True)]
    down, right = (int(torch.randint(most, (), generator=generator)) for most in spare)
    inside = (..., slice(down, down + sides[0]), slice(right, right + sides[1]))
    mixed = x.clone()
    mixed[inside] = x[torch.randperm(len(x), generator=generator)][inside]
    return mixed


AUGMENTATIONS: dict[str, Augmentation] = {"none": none, "cifar": cifar, "imagenet": imagenet}


def augmentation(name: str) -> Augmentation:
    """The augmentation called `name`; raises UnknownNameError, with the nearest names, where there is none."""
    if name not in AUGMENTATIONS:
        raise UnknownNameError("augmentation", name, AUGMENTATIONS)
    return AUGMENTATIONS[name]


def is_images(batch: Inputs) -> TypeGuard[Tensor]:
    """Whether inputs are a batch of images in one tensor."""
    return isinstance(batch, Tensor) and batch.ndim == 4 and batch.is_floating_point()


def darkest(images: Iterable[Float[Tensor, "_ c h w"]]) -> Float[Tensor, " c"]:
    """The smallest value of every channel in batches of images, which is taken for black."""
    return torch.stack([one.amin((0, 2, 3)) for one in images]).amin(0)


def with_copies(batches: Iterable[Inputs], copies: int) -> list[Inputs]:
    """Batches of images, then so many copies of each, as `cifar` moves them; raises DataError for other inputs."""
    kept = list(batches)
    if not copies:
        return kept
    images = [one for one in kept if is_images(one)]
    if len(images) < len(kept):
        raise DataError("copies are of images, and the calibration inputs are none; leave the copies out")
    black, generator = darkest(images), torch.Generator().manual_seed(0)
    return [*kept, *(cifar(one, black, generator) for _ in range(copies) for one in images)]


def _coin(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < 0.5
