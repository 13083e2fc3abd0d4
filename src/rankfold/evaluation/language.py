"""What a language model is worth: perplexity on text, and how fast it reads a prompt and writes on."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn import functional

from rankfold.errors import DataError, reason_of
from rankfold.network.passes import evaluating, output_of
from rankfold.progress import Progress, silent

PROMPT, WRITTEN, ROUNDS = 128, 32, 3
"""Tokens that are read, and written, while a model is timed, and how often."""
_CHUNK = 256
"""Positions whose distributions are in memory together: vocabularies are large."""


@dataclass(frozen=True)
class Perplexity:
    """The exponential of the mean loss, in nats per token, over so many predicted tokens in blocks of equal length."""

    value: float
    loss: float
    tokens: int
    blocks: int
    length: int


@dataclass(frozen=True)
class Speed:
    """Tokens per second, in a batch of one: of a prompt, and of those written one by one with a cache."""

    prompt: float
    written: float


def perplexity(
    model: nn.Module,
    rows: Int64[Tensor, "blocks length"],
    *,
    progress: Progress = silent,
    what: str = "scoring text",
) -> Perplexity:
    """The perplexity of a causal language model on blocks of tokens, each on its own: all but its first are predicted.

    Raises DataError for a model that does not give a distribution over its vocabulary at every position, or predicts
    other tokens than the next.
    """
    check_causal(model)
    device = next(model.parameters()).device
    total, count = 0.0, len(rows) * (rows.shape[1] - 1)
    with evaluating(model), torch.no_grad():
        for number, row in enumerate(rows):
            progress(what, number, len(rows))
            total += _loss(model, row[None].to(device))
    progress(what, len(rows), len(rows))
    loss = total / count
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, count, len(rows), rows.shape[1])


def speeds(models: Sequence[nn.Module], rows: Int64[Tensor, "blocks length"]) -> tuple[Speed, ...] | None:
    """How fast models read and write, in turns in one run; None where they have no `generate`.

    A first round warms up; then medians count.
    """
    if not all(callable(getattr(model, "generate", None)) for model in models):
        return None
    prompt = rows[:1, :PROMPT]
    read: list[list[float]] = [[] for _ in models]
    written: list[list[float]] = [[] for _ in models]
    for turn in range(1 + ROUNDS):
        for place, model in enumerate(models):
            first, more = (_seconds(cast(Any, model), prompt, count) for count in (1, 1 + WRITTEN))
            if turn:
                read[place].append(prompt.shape[1] / first)
                written[place].append(WRITTEN / max(more - first, 1e-9))
    return tuple(Speed(median(one), median(other)) for one, other in zip(read, written, strict=True))


def check_causal(model: nn.Module) -> None:
    """Raises DataError for a model that is known not to predict the next token."""
    able = getattr(model, "can_generate", None)
    config: Any = getattr(model, "config", None)
    if (callable(able) and not able()) or getattr(config, "is_encoder_decoder", False):
        raise DataError(
            f"{type(model).__name__} does not predict the next token of a text, so it has no perplexity; score it on "
            "data of its task"
        )


def _loss(model: nn.Module, row: Int64[Tensor, "1 length"]) -> float:
    """The sum of the losses of all tokens but the first."""
    try:
        logits = output_of(model(input_ids=row))
    except Exception as error:
        raise DataError(f"the model does not take blocks of {row.shape[1]} tokens: {reason_of(error)}") from error
    if logits.ndim != 3 or logits.shape[:2] != row.shape:
        raise DataError("the model's output is not one row of logits per token; evaluate it with code of your own")
    pairs = zip(logits[0, :-1].split(_CHUNK), row[0, 1:].split(_CHUNK), strict=True)
    return sum(float(functional.cross_entropy(part.float(), wanted, reduction="sum")) for part, wanted in pairs)


def _seconds(model: Any, prompt: Tensor, count: int) -> float:
    """How long it takes to read a prompt and write so many tokens."""
    place = next(model.parameters()).device
    start = time.perf_counter()
    with evaluating(model), torch.no_grad():
        model.generate(
            input_ids=prompt.to(place),
            attention_mask=torch.ones_like(prompt).to(place),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=0,
        )
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter() - start
