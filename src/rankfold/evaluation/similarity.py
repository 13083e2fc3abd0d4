"""What a model of sentences is worth: how its similarities agree with those that people gave."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from rankfold.errors import DataError, reason_of
from rankfold.network.passes import device_of, evaluating, output_of
from rankfold.progress import Progress, silent

IN_PASS = 64
"""Sentences in a pass, at most: all of one length, so that nothing is padded."""


@dataclass(frozen=True)
class Similarity:
    """Spearman's correlation, in percent, of cosines of embeddings with the scores of so many pairs."""

    spearman: float
    pairs: int


def similarity(
    model: nn.Module,
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]],
    scores: Sequence[float],
    *,
    progress: Progress = silent,
    what: str = "scoring pairs",
) -> Similarity:
    """How far the order of a model's similarities is that of the scores, for pairs of tokenised sentences.

    A sentence's embedding is the mean of the model's first output over its tokens, or that output where it has none.
    Raises DataError for a model that does not take tokens alone, and where all its similarities are the same.
    """
    if not all(map(len, (*first, *second))):
        raise DataError("a sentence has no tokens; leave its pair out")
    vectors = embeddings(model, [*first, *second], progress=progress, what=what)
    cosines = functional.cosine_similarity(vectors[: len(first)], vectors[len(first) :])
    if not bool(cosines.isfinite().all()):
        raise DataError("the model gives embeddings that are not finite")
    if len(cosines.unique()) < 2 or len(set(scores)) < 2:
        raise DataError("the model finds all pairs alike, or their scores are all the same: there is no correlation")
    return Similarity(100 * float(spearmanr(cosines.numpy(), list(scores)).statistic), len(scores))


def embeddings(
    model: nn.Module, sentences: Sequence[Sequence[int]], *, progress: Progress = silent, what: str = "embedding"
) -> Float[Tensor, "sentences width"]:
    """One vector for every tokenised sentence, in their order."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for place, tokens in enumerate(sentences):
        by_length[len(tokens)].append(place)
    passes = [places[k : k + IN_PASS] for places in by_length.values() for k in range(0, len(places), IN_PASS)]
    found: dict[int, Tensor] = {}
    with evaluating(model), torch.no_grad():
        for done, places in enumerate(passes):
            progress(what, done, len(passes))
            rows = torch.tensor([list(sentences[place]) for place in places], device=device_of(model))
            found |= dict(zip(places, _pooled(model, rows).float().cpu(), strict=True))
    progress(what, len(passes), len(passes))
    return torch.stack([found[place] for place in range(len(sentences))])


def _pooled(model: nn.Module, rows: Tensor) -> Tensor:
    try:
        out: Any = output_of(model(input_ids=rows))
    except Exception as error:
        raise DataError(f"the model does not take sentences of tokens alone: {reason_of(error)}") from error
    states: Tensor = out
    if states.ndim == 3 and states.shape[:2] == rows.shape:
        return states.mean(1)
    if states.ndim != 2 or len(states) != len(rows):
        raise DataError(f"the model gives {tuple(states.shape)} for {tuple(rows.shape)} tokens, no vector per sentence")
    return states
