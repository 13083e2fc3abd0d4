"""Some of the calibration inputs as small pictures, where they are images: to see what a plan was made by."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from rankfold.network.passes import Inputs, few, tensors_in

SHOWN = 8
"""Inputs that are shown, the first ones."""
SIDE = 96
"""Pixels of the longer side of a picture, at most."""


def pictures(batches: Iterable[Inputs]) -> tuple[str, ...]:
    """The first inputs as PNG files in `data:` addresses; none where a batch is not one tensor of images.

    Images have one or three channels. What they were normalised by is not known: each is stretched to its own range.
    """
    found = [tensors_in(batch) for batch in few(batches, SHOWN)]
    images = [batch[0] for batch in found if len(batch) == 1 and _are_images(batch[0])]
    return tuple(_as_png(one) for batch in images for one in batch)[:SHOWN]


def _are_images(x: Tensor) -> bool:
    return x.is_floating_point() and x.ndim == 4 and x.shape[1] in (1, 3) and min(x.shape[2:]) > 1


def _as_png(image: Tensor) -> str:
    """An image (channels, height, width) as a PNG file in a `data:` address (ISO/IEC 15948, no filter)."""
    image = image.detach().float().cpu().nan_to_num()
    shrunk = max(image.shape[1:]) / SIDE
    if shrunk > 1:
        size = [max(1, round(side / shrunk)) for side in image.shape[1:]]
        image = torch.nn.functional.interpolate(image[None], size, mode="area")[0]
    low, high = image.amin(), image.amax()
    pixels = (255 * (image - low) / (high - low).clamp_min(1e-12)).round().to(torch.uint8)
    channels, height, width = pixels.shape
    rows = pixels.permute(1, 2, 0).reshape(height, width * channels).numpy()
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(data, 9)), (b"IEND", b""))
    file = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"
