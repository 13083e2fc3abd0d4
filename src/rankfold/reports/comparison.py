"""A saved model against its original: what it scores on labelled data, text or pairs, its size and time, in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold.budget import Cost
from rankfold.evaluation import (
    Accuracy,
    Perplexity,
    Similarity,
    Speed,
    accuracy,
    latency,
    perplexity,
    similarity,
    speeds,
)
from rankfold.evaluation.language import check_causal
from rankfold.files.artifact import load, load_plan
from rankfold.files.original import load_original_, one_input, rebuild
from rankfold.plan import Plan
from rankfold.progress import Progress, silent
from rankfold.sources.data import Normalisation, open_dataset
from rankfold.sources.devices import open_device
from rankfold.sources.pairs import open_pairs
from rankfold.sources.text import Blocks, known_tokenizer, open_text

NAMES = ("the original", "the compressed model")
LENGTH = 1024
"""Tokens in a block of text, unless said otherwise."""


@dataclass(frozen=True)
class Side:
    """One of the two networks: its accuracy (None: not scored), cost, and median latency of a batch of one."""

    accuracy: Accuracy | None
    cost: Cost
    latency_ms: float

    def as_dict(self) -> dict[str, Any]:
        """The side in JSON's types, accuracies in percent."""
        top = (
            {"top1": self.accuracy.top1, "top5": self.accuracy.top5} if self.accuracy else {"top1": None, "top5": None}
        )
        return {**top, **self.cost.as_dict(), "latency_ms": self.latency_ms}


@dataclass(frozen=True)
class Comparison:
    """Original and compressed network, side by side."""

    examples: int
    original: Side
    compressed: Side
    normalisation: Normalisation

    def as_dict(self) -> dict[str, Any]:
        """The comparison in JSON's types."""
        return {
            "examples": self.examples,
            "original": self.original.as_dict(),
            "compressed": self.compressed.as_dict(),
            "normalisation": asdict(self.normalisation),
        }


@dataclass(frozen=True)
class LanguageSide:
    """One of two language models: its perplexity, cost, and tokens per second, where it can write."""

    perplexity: Perplexity
    cost: Cost
    speed: Speed | None

    def as_dict(self) -> dict[str, Any]:
        """The side in JSON's types."""
        speed = asdict(self.speed) if self.speed else {"prompt": None, "written": None}
        return {
            "perplexity": self.perplexity.value,
            "loss": self.perplexity.loss,
            **self.cost.as_dict(),
            "tokens_per_second": speed,
        }


@dataclass(frozen=True)
class LanguageComparison:
    """Original and compressed language model on blocks of a text, side by side."""

    original: LanguageSide
    compressed: LanguageSide
    blocks: Blocks

    def as_dict(self) -> dict[str, Any]:
        """The comparison in JSON's types; the protocol is part of it, since perplexities hang on it."""
        return {
            "original": self.original.as_dict(),
            "compressed": self.compressed.as_dict(),
            "blocks": len(self.blocks.rows),
            "length": self.blocks.rows.shape[1],
            "stride": self.blocks.stride,
            "predicted_tokens": self.original.perplexity.tokens,
            "text_tokens": self.blocks.tokens,
        }


@dataclass(frozen=True)
class SimilaritySide:
    """One of two models of sentences: its correlation, cost, and median latency of the longest sentence."""

    similarity: Similarity
    cost: Cost
    latency_ms: float

    def as_dict(self) -> dict[str, Any]:
        """The side in JSON's types, the correlation in percent."""
        return {"spearman": self.similarity.spearman, **self.cost.as_dict(), "latency_ms": self.latency_ms}


@dataclass(frozen=True)
class SimilarityComparison:
    """Original and compressed model of sentences on pairs that people scored, side by side."""

    original: SimilaritySide
    compressed: SimilaritySide

    def as_dict(self) -> dict[str, Any]:
        """The comparison in JSON's types."""
        pairs = self.original.similarity.pairs
        return {"original": self.original.as_dict(), "compressed": self.compressed.as_dict(), "pairs": pairs}


def compare_on_pairs(
    directory: str | Path,
    data: str,
    *,
    weights: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> SimilarityComparison:
    """Scores the model of sentences saved in `directory` and its original on the pairs in "pairs:FILE", and times both.

    Both run on `device`. Sentences are tokenised as the original's tokenizer does, and embedded without padding.
    """
    plan = load_plan(directory)
    source, _ = rebuild(plan, directory)
    pairs = open_pairs(data)
    tokenize = known_tokenizer(data, source.tokenize)
    first, second = ([tokenize(one) for one in side] for side in (pairs.first, pairs.second))
    models = _both(directory, source.model, plan, weights, device)
    scores = [
        similarity(model, first, second, pairs.scores, progress=progress, what=f"scoring {name}")
        for model, name in zip(models, NAMES, strict=True)
    ]
    longest = {"input_ids": torch.tensor([max((*first, *second), key=len)])}
    sides = zip(scores, (plan.before, plan.after), latency(models, longest), strict=True)
    return SimilarityComparison(*(SimilaritySide(*one) for one in sides))


def compare_on_text(
    directory: str | Path,
    data: str,
    *,
    length: int = LENGTH,
    samples: int | None = None,
    weights: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> LanguageComparison:
    """Scores the language model saved in `directory` and its original on the text in "text:FILE", and times both.

    Both run on `device`. The text is cut into blocks of `length` tokens, or `samples` evenly spaced ones of them.
    """
    plan = load_plan(directory)
    source, _ = rebuild(plan, directory)
    check_causal(source.model)
    blocks = open_text(data, source.tokenize, length, samples)
    models = _both(directory, source.model, plan, weights, device)
    scores = [
        perplexity(model, blocks.rows, progress=progress, what=f"scoring {name}")
        for model, name in zip(models, NAMES, strict=True)
    ]
    timed = speeds(models, blocks.rows) or (None, None)
    costs = (plan.before, plan.after)
    original, compressed = (LanguageSide(*one) for one in zip(scores, costs, timed, strict=True))
    return LanguageComparison(original, compressed, blocks)


def compare(
    directory: str | Path,
    data: str,
    *,
    original: bool = False,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Comparison:
    """Scores the model saved in `directory` on `data`, and times it and its original in turns.

    The original is built as it was for compression; it is scored only where `original` is set, with the weights it had
    then, or those in `weights`. Normalisation is the model's own unless `mean` and `std` are given. Both run on
    `device`.
    """
    plan = load_plan(directory)
    source, several = rebuild(plan, directory)
    shape = one_input(several, data)
    student = load(directory, source.model)
    normalisation = source.normalised_by(shape[0], mean, std)
    dataset = open_dataset(data, shape, normalisation, normalise_floats=mean is not None or std is not None)
    if original:
        load_original_(source.model, plan, weights)
    source.model.to(next(p.dtype for p in student.parameters() if p.is_floating_point()))
    _placed(device, source.model, student)
    dense_ms, student_ms = latency((source.model, student), source.example(shape))
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    base = accuracy(source.model, dataset, what="scoring the original", **options) if original else None
    scored = accuracy(student, dataset, what="scoring the compressed model", **options)
    return Comparison(
        len(dataset), Side(base, plan.before, dense_ms), Side(scored, plan.after, student_ms), normalisation
    )


def _both(
    directory: str | Path, model: nn.Module, plan: Plan, weights: str | Path | None, device: str
) -> tuple[nn.Module, ...]:
    """The original with its weights, and the model saved in a directory, on a device."""
    student = load(directory, model)
    load_original_(model, plan, weights)
    return _placed(device, model, student)


def _placed(device: str, *models: nn.Module) -> tuple[nn.Module, ...]:
    """The same networks, moved to the device of that name."""
    place = open_device(device)
    return tuple(model.to(place) for model in models)
