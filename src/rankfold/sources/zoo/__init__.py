"""The paper's networks, and those the benchmarks use, in plain torch with their customary key names.

No weights are contained; `load_state_dict` takes the files that carry these names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from rankfold.errors import UnknownNameError
from rankfold.sources.zoo.convnets import CifarVGG16, LeNet
from rankfold.sources.zoo.deit import VisionTransformer
from rankfold.sources.zoo.digits import DigitsNet
from rankfold.sources.zoo.mobilenet import MobileNetV2
from rankfold.sources.zoo.resnet import CifarResNet, ResNet18

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Entry:
    """A network of the zoo: how to build it, the shape of one input, and the normalisation of inputs in [0, 1]."""

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


ZOO: dict[str, Entry] = {
    "digits": Entry(DigitsNet, (1, 8, 8), (0.0,), (1.0,)),
    "mnist_lenet": Entry(LeNet, (1, 28, 28), (0.0,), (1.0,)),
    **{f"cifar10_resnet{depth}": Entry(partial(CifarResNet, depth), (3, 32, 32)) for depth in (20, 32, 44, 56)},
    "cifar10_vgg16": Entry(CifarVGG16, (3, 32, 32)),
    "resnet18": Entry(ResNet18, (3, 224, 224)),
    "mobilenet_v2": Entry(MobileNetV2, (3, 224, 224)),
    "deit_tiny": Entry(VisionTransformer, (3, 224, 224)),
}


def entry(name: str) -> Entry:
    """The zoo's entry called `name`; raises UnknownNameError, with the nearest names, where there is none."""
    if name not in ZOO:
        raise UnknownNameError("zoo network", name, ZOO)
    return ZOO[name]


def build(name: str) -> nn.Module:
    """The network called `name`, freshly initialised, in evaluation mode."""
    return entry(name).build().eval()
