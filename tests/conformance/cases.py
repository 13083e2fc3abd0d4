"""What the conformance suite runs over: every decomposition, every layer kind, every search, straight from the tables.

A layer kind that is registered without a case here fails `test_every_layer_kind_has_a_case`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankfold.decompositions import DECOMPOSITIONS
from rankfold.network.stand_ins.stack import Stack
from rankfold.search import SEARCHES
from rankfold.sources.models import complete_torchvision

complete_torchvision()
from transformers.pytorch_utils import Conv1D  # noqa: E402

NAMES = tuple(DECOMPOSITIONS)
SEARCH_NAMES = tuple(SEARCHES)


@dataclass(frozen=True)
class Case:
    """A layer and the shape of its inputs; of tokens where it looks up, and with the number of a matrix in a stack."""

    label: str
    module: nn.Module
    inputs: tuple[int, ...]
    matrix: int = 0

    def arguments(self, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """What the layer is called with, in an order of positions."""
        generator = torch.Generator().manual_seed(3)
        if isinstance(self.module, nn.Embedding):
            return (torch.randint(self.module.num_embeddings, self.inputs, generator=generator),)
        x = torch.randn(self.inputs, generator=generator).to(dtype)
        return (x, self.matrix) if isinstance(self.module, Stack) else (x,)


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
        Case("linear-vector", nn.Linear(9, 12), (9,)),
        Case("linear-transposed", _transposed_linear(12, 9), (2, 5, 12)),
        Case("embedding", nn.Embedding(15, 10), (2, 7)),
        Case("embedding-padded", nn.Embedding(8, 11, padding_idx=2), (3, 6)),
        Case("stack-of-rows", Stack(nn.Parameter(torch.randn(3, 9, 12)), by_rows=True), (5, 12), matrix=1),
        Case("stack-of-columns", Stack(nn.Parameter(torch.randn(4, 12, 9)), by_rows=False), (2, 5, 12), matrix=3),
        Case("stack-square", Stack(nn.Parameter(torch.randn(2, 10, 10)), by_rows=False), (4, 10), matrix=0),
    ]


def _transposed_linear(inputs: int, outputs: int) -> nn.Module:
    """The Linear of transformers that keeps inputs before outputs."""
    made = Conv1D(outputs, inputs)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    return made


CASES = _cases()

BATCHED = [case for case in CASES if len(case.inputs) > 1 and not isinstance(case.module, (nn.Embedding, Stack))]
"""The cases whose inputs are a batch of numbers in one tensor."""
