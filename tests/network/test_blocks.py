"""Blocks are found in a pass: what stands in rows, is called once and keeps its size."""

from __future__ import annotations

import torch
from torch import nn

from rankfold.network.blocks import find_blocks
from rankfold.network.copies import duplicate
from rankfold.network.finding import find_layers
from rankfold.sources.models import build_model


def blocks_of(model: nn.Module, x: torch.Tensor) -> list[str]:
    names = {layer.name for layer in find_layers(model, x).found}
    return list(find_blocks(model, duplicate(model), x, names))


def test_of_a_residual_network_they_are_its_blocks_and_the_layers_around_them():
    source = build_model("zoo:cifar10_resnet20")
    found = blocks_of(source.model, torch.zeros(2, 3, 32, 32))
    assert len(found) == 9 + 2
    assert all(isinstance(source.model.get_submodule(name), (nn.Conv2d, nn.Linear)) for name in (found[0], found[-1]))


def test_of_an_encoder_they_are_its_layers():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 3), nn.Linear(16, 4)).eval()
    x = torch.randn(2, 5, 8)
    changed = {f"1.layers.{k}.{name}" for k in range(3) for name in ("linear1", "linear2")} | {"2"}
    assert list(find_blocks(model, duplicate(model), x, changed)) == ["1.layers.0", "1.layers.1", "1.layers.2", "2"]


def test_what_is_called_twice_or_gives_less_is_none():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second, third = self.parts
            return third(second(first(first(x))))

    model, x = Twice(), torch.randn(2, 6)
    assert blocks_of(model, x) == ["parts.1", "parts.2"]
    narrower = duplicate(model)
    narrower.parts[1], narrower.parts[2] = nn.Linear(6, 4), nn.Linear(4, 3)
    assert list(find_blocks(model, narrower, x, {"parts.1", "parts.2"})) == ["parts.2"]
