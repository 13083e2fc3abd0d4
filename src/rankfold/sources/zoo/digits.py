"""The embedded default: a small CNN for scikit-learn's 8×8 digits, trained by tools/train_digits.py."""

from __future__ import annotations

from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Four 3×3 convolutions with batch norm, pooled once, and a linear classifier; input (n, 1, 8, 8) in [0, 1]."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for outputs in (width, 2 * width, 2 * width, 2 * width):
            layers += [nn.Conv2d(channels, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        layers.insert(6, nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
