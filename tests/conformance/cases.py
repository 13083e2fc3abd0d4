"""What the conformance suite runs over: every decomposition, every layer kind, every search, straight from the tables.

A layer kind that is registered without a case here fails `test_every_layer_kind_has_a_case`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rankfold.decompositions import DECOMPOSITIONS
from rankfold.search import SEARCHES

NAMES = tuple(DECOMPOSITIONS)
SEARCH_NAMES = tuple(SEARCHES)


@dataclass(frozen=True)
class Case:
    label: str
    module: nn.Module
    inputs: tuple[int, ...]


def _cases() -> list[Case]:
    torch.manual_seed(0)
    return [
        Case("linear", nn.Linear(12, 9), (2, 5, 12)),
        Case("conv1d", nn.Conv1d(6, 8, 5, stride=2, padding=2, bias=False), (2, 6, 11)),
        Case("conv1d-same-even", nn.Conv1d(5, 6, 4, padding="same"), (2, 5, 9)),
        Case("conv2d", nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 6)),
        Case("conv2d-uneven", nn.Conv2d(6, 7, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 6, 9, 8)),
        Case("conv2d-same", nn.Conv2d(5, 6, (3, 4), padding="same", dilation=(2, 1)), (2, 5, 9, 8)),
        Case("conv2d-reflect", nn.Conv2d(5, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 5, 7, 8)),
        Case("conv2d-circular-same", nn.Conv2d(5, 6, 3, padding="same", padding_mode="circular"), (1, 5, 6, 6)),
        Case(
            "conv2d-replicate",
            nn.Conv2d(5, 6, (1, 3), stride=2, padding=(1, 1), padding_mode="replicate"),
            (1, 5, 6, 6),
        ),
        Case("conv2d-pointwise", nn.Conv2d(8, 6, 1, stride=2), (2, 8, 7, 7)),
        Case("conv2d-grouped", nn.Conv2d(8, 12, 3, padding=1, groups=2), (2, 8, 6, 6)),
        Case("conv2d-depthwise", nn.Conv2d(6, 6, 5, padding=2, groups=6), (2, 6, 9, 9)),
        Case("conv3d", nn.Conv3d(4, 6, (3, 2, 3), stride=(1, 2, 1), padding=1), (1, 4, 5, 6, 5)),
        Case("conv3d-grouped", nn.Conv3d(4, 6, (2, 3, 3), groups=2), (1, 4, 4, 5, 5)),
        Case("transposed1d", nn.ConvTranspose1d(6, 5, 4, stride=2, padding=1, output_padding=1), (2, 6, 7)),
        Case("transposed2d", nn.ConvTranspose2d(6, 5, 3, stride=2, padding=1, output_padding=(1, 0)), (2, 6, 5, 6)),
        Case("transposed2d-flat", nn.ConvTranspose2d(6, 5, (1, 3), stride=(2, 1), bias=False), (1, 6, 4, 5)),
        Case("transposed2d-grouped", nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2, dilation=2), (1, 8, 5, 5)),
        Case("transposed3d", nn.ConvTranspose3d(4, 5, (2, 3, 3), stride=(2, 1, 1), padding=(0, 1, 1)), (1, 4, 3, 4, 4)),
    ]


CASES = _cases()
