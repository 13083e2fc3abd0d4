"""Small networks that several tests use."""

from __future__ import annotations

import torch
from torch import nn


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
