"""Text as blocks of tokens, by the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from rankfold.errors import DataError

KIND = "text:"


@dataclass(frozen=True)
class Blocks:
    """Blocks of tokens of a text that has `tokens` in all; every block starts `stride` behind the last, about."""

    rows: Int64[Tensor, "blocks length"]
    tokens: int
    stride: int


@dataclass(frozen=True)
class TextData:
    """Blocks of tokens as labelled inputs, as `sources.data.Dataset` has images: labels are the next tokens."""

    rows: Int64[Tensor, "blocks length"]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of a block."""
        return tuple(self.rows.shape[1:])

    @property
    def black(self) -> Tensor:
        """What a black pixel is: there is none."""
        return torch.zeros(1)

    def take(self, places: Sequence[int]) -> TextData:
        """The blocks at these places."""
        return TextData(self.rows[list(places)])

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Tokens (n, length), twice: what is read, and what is to be predicted."""
        return self.rows[start:stop], self.rows[start:stop]


def is_text(spec: str) -> bool:
    """Whether a specification of data is that of a text."""
    return spec.startswith(KIND)


def known_tokenizer(spec: str, tokenize: Callable[[str], list[int]] | None) -> Callable[[str], list[int]]:
    """What tokenises the data of a specification; raises DataError where the model has nothing to."""
    if tokenize is None:
        raise DataError(f"{spec} needs a model with a tokenizer: give it as hf:NAME or hf:DIR")
    return tokenize


def open_text(
    spec: str, tokenize: Callable[[str], list[int]] | None, length: int, samples: int | None = None
) -> Blocks:
    """Blocks of `length` tokens of the file in "text:FILE": evenly spaced ones, from the first to the last.

    All that do not overlap, where `samples` is None or asks for more. Raises DataError where there is no tokenizer, or
    the text cannot be read or is shorter than a block.
    """
    path = Path(spec.removeprefix(KIND))
    tokenize = known_tokenizer(spec, tokenize)
    if length < 2:
        raise DataError(f"blocks of {length} tokens are too short: give at least 2")
    try:
        tokens = torch.tensor(tokenize(path.read_text(encoding="utf-8")), dtype=torch.int64)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable text in UTF-8: {error}") from error
    most = len(tokens) // length
    if most == 0:
        raise DataError(
            f"{path} has {len(tokens)} tokens, not a block of {length}; give more text, or a shorter length"
        )
    count = most if samples is None else min(samples, most)
    if count == most:
        return Blocks(tokens[: most * length].view(most, length), len(tokens), length)
    starts = torch.linspace(0, len(tokens) - length, count).long().tolist()
    rows = torch.stack([tokens[start : start + length] for start in starts])
    return Blocks(rows, len(tokens), starts[1] - starts[0] if count > 1 else len(tokens))
