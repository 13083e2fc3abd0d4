"""Small networks with hidden channels of every kind, and what is between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """Two chained sets within a shortcut; `groups` of the middle layer."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.reduce, self.first = nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.middle, self.second = nn.Conv2d(16, 16, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(16)
        self.widen, self.third = nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.first(self.reduce(x)))
        y = torch.relu_(self.second(self.middle(y)))
        return self.head(torch.relu(x + self.third(self.widen(y))).mean((2, 3)))


class Gate(nn.Module):
    """A squeeze-and-excitation gate behind a depthwise convolution, with PReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 16, 1), nn.PReLU(16))
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.BatchNorm2d(16), nn.Hardswish())
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x))
        gate = self.excite(torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(x, 1))))
        return self.project(x * torch.sigmoid(gate))


class Gated(nn.Module):
    """A SwiGLU, or with one `packed` layer a GEGLU; a scale and dropout before the layer that reads it."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.packed = packed
        self.gate = nn.Linear(12, 48 if packed else 24)
        self.up = nn.Identity() if packed else nn.Linear(12, 24, bias=False)
        self.scale = nn.Parameter(torch.rand(24) + 0.5)
        self.drop = nn.Dropout()
        self.down = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            gate, up = self.gate(x).chunk(2, -1)
            hidden = nn.functional.gelu(gate) * up
        else:
            hidden = nn.functional.silu(self.gate(x)) * self.up(x)
        return x + self.down(self.drop(hidden * self.scale))


def flattened() -> nn.Module:
    """Channels with nine entries each by the time a Linear reads them."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(90, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 12, 2, 2), nn.LeakyReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).cumsum(-1) / 2 + 0.3


def tokens(count: int = 24) -> Tensor:
    return torch.randn(count, 5, 12, generator=torch.Generator().manual_seed(1)).cumsum(-1) / 2


BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], dict[str, int]]] = {
    "bottleneck": (Bottleneck, images, {"middle": 16, "widen": 16}),
    "grouped": (lambda: Bottleneck(4), images, {"middle": 16, "widen": 16}),
    "gate": (Gate, images, {"squeeze": 16, "excite": 8}),
    "swiglu": (Gated, tokens, {"down": 24}),
    "geglu": (lambda: Gated(packed=True), tokens, {"down": 24}),
    "flattened": (flattened, images, {"4": 10, "6": 16}),
    "transposed": (transposed, images, {"2": 12, "4": 8}),
}
"""What builds a network, what makes inputs, and its channel sets: the layer that reads one, and how many there are."""


def built(name: str) -> tuple[nn.Module, Tensor]:
    """A network with batch norms that hold statistics, and inputs."""
    make, inputs, _ = BLOCKS[name]
    torch.manual_seed(0)
    model, x = make(), inputs()
    model.train()
    for _ in range(20):
        model(x)
    return model.eval(), x
