"""Small networks that several tests use."""

from __future__ import annotations

import torch
from torch import nn


def small_cnn() -> nn.Module:
    """Two convolutions and a Linear, for images of 8 × 8."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    ).eval()


class Tied(nn.Module):
    """One module used twice, two modules with one weight, and a weight tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.shared = nn.Linear(24, 24)
        self.again = self.shared
        self.first = nn.Linear(24, 32)
        self.second = nn.Linear(24, 32)
        self.second.weight = self.first.weight
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.again(torch.relu(self.shared(self.embed(tokens))))
        return self.head(x), self.first(x) + self.second(x)
