"""What an entry of the list is, and the few ways its networks and inputs are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Any]
"""A network, and example inputs: a tensor, a tuple of positional or a dict of keyword arguments."""


@dataclass(frozen=True)
class Architecture:
    """A small network of a real library's classes, of random weights.

    `library` is the package whose classes it is made of, as imported. `tested` marks the quick ones that the tests
    compress, `ragged` those whose outputs' sizes depend on their values.
    """

    name: str
    family: str
    library: str
    make: Callable[[], Built]
    tested: bool = False
    ragged: bool = False

    def build(self, seed: int = 0) -> Built:
        """The network in evaluation mode, with the weights of a seed, and its example inputs, the same for all seeds.

        Parameters that start as a constant are moved off it: a layer scale or an embedding of zeros would hide the
        layers behind it. Raises ModuleNotFoundError where the library is missing.
        """
        torch.manual_seed(seed)
        model, inputs = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                if (parameter == parameter.flatten()[0]).all():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval(), inputs


def called(path: str, inputs: Callable[[], Any], *args: Any, **settings: Any) -> Callable[[], Built]:
    """A builder that calls "package.module:name", imported no sooner than that."""

    def make() -> Built:
        module, _, name = path.partition(":")
        return getattr(import_module(module), name)(*args, **settings), inputs()

    return make


def configured(path: str, inputs: Callable[[], Any], **settings: Any) -> Callable[[], Built]:
    """A builder of a transformers class, "Name" or "package.module:Name", from a configuration of these settings."""

    def make() -> Built:
        module, _, name = path.rpartition(":")
        network = getattr(import_module(module or "transformers"), name)
        return network(network.config_class(**settings)), inputs()

    return make


def generator() -> torch.Generator:
    """A fresh generator that always gives the same numbers."""
    return torch.Generator().manual_seed(0)


def noise(*shape: int) -> Tensor:
    """Standard normal numbers, the same every time."""
    return torch.randn(*shape, generator=generator())


def image(size: int, batch: int = 1, channels: int = 3) -> Callable[[], Tensor]:
    """Maker of images."""
    return lambda: noise(batch, channels, size, size)


def clip(frames: int, size: int) -> Callable[[], Tensor]:
    """Maker of a video clip, channels before frames."""
    return lambda: noise(1, 3, frames, size, size)


def words(length: int = 16, vocabulary: int = 512, batch: int = 1) -> Tensor:
    """Token ids, none of them among the first ten, where special ones are."""
    return torch.randint(10, vocabulary, (batch, length), generator=generator())


def tokens() -> dict[str, Tensor]:
    """Keyword arguments of a language model."""
    return {"input_ids": words()}


def pairs() -> dict[str, Tensor]:
    """Keyword arguments of an encoder and decoder of language."""
    return {"input_ids": words(), "decoder_input_ids": words(12)}


def named(name: str, make: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    """Maker of one keyword argument."""
    return lambda: {name: make()}


def wave(samples: int = 4000) -> dict[str, Tensor]:
    """Keyword arguments of a speech model: a quarter of a second."""
    return {"input_values": noise(1, samples)}


def both() -> dict[str, Tensor]:
    """Keyword arguments of a model of text and images."""
    return {"input_ids": words(), "pixel_values": noise(1, 3, 32, 32)}
