"""Tokens to calibrate on, made from nothing but the network.

A model that predicts the next token writes them itself, one after another by its own distribution, from a first one
drawn at random (Liu et al., LLM-QAT, arXiv 2305.17888, train on such): what it was trained on is what it writes. Others
are given tokens at random: no statistics of language, but the range of the embeddings.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn
from torch.nn import functional

from rankfold.errors import DataError
from rankfold.network.hooks import attached
from rankfold.network.passes import Inputs, arguments_of, copied, device_of, evaluating, seeded
from rankfold.progress import Progress, silent

IN_PASS = 72
"""Rows that are written together, at most."""


class Drawn:
    """A draw from a model's distribution over the next token, none that ends a row, as what `generate` calls a
    processor of logits: what it gives back leaves one token to choose.

    One number per row is drawn, always on the CPU, and looked up in the cumulative distribution, first of groups of
    tokens and then of those of one: `generate`'s own way draws one for every token there is, which takes a quarter of
    the time of a small network's pass, and sums over all tokens one after another take a seventh.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        config: Any = getattr(model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        self.ends: list[int] = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        scores[:, self.ends] = -torch.inf
        count = scores.shape[1]
        size = math.ceil(count**0.5)
        groups = functional.pad(scores.softmax(-1), (0, size**2 - count)).unflatten(1, (size, size))
        level = torch.rand(len(scores), 1, generator=self.generator, dtype=torch.float64).to(scores.device)
        group, level = _reached(groups.sum(-1, dtype=torch.float64), level)
        token, _ = _reached(groups.take_along_dim(group[..., None], 1)[:, 0].double(), level)
        drawn = (group * size + token).clamp_max(count - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _reached(
    shares: Float64[Tensor, "rows n"], level: Float64[Tensor, "rows 1"]
) -> tuple[Int[Tensor, "rows 1"], Float64[Tensor, "rows 1"]]:
    """Where the sums of shares reach a level, from 0 to 1 of all of them, and the level within the share there."""
    sums = shares.cumsum(-1)
    level = level * sums[:, -1:]
    place = torch.searchsorted(sums, level, right=True).clamp_max(shares.shape[1] - 1)
    own = shares.gather(1, place)
    return place, (level - sums.gather(1, place) + own) / own


def tokens_of(model: nn.Module, example_inputs: Inputs) -> tuple[int | str, int] | None:
    """Which argument holds tokens, and out of how many: the rows of the largest embedding that it is an index into."""
    args, kwargs = arguments_of(copied(example_inputs, device_of(model)))
    given = _arguments((args, kwargs))
    integers = {
        place: ids
        for place, ids in given.items()
        if isinstance(ids, Tensor) and ids.ndim > 1 and ids.dtype in (torch.int64, torch.int32)
    }
    read: list[tuple[int | str, int]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = cast(nn.Embedding, module).num_embeddings
        same = [place for place, ids in integers.items() if inputs and inputs[0].data_ptr() == ids.data_ptr()]
        read.extend((place, rows) for place in same)

    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if integers and embeddings:
        hooks = attached(module.register_forward_pre_hook(note) for module in embeddings)
        with hooks, evaluating(model), seeded(model), torch.no_grad():
            model(*args, **kwargs)
    return max(read, key=lambda one: one[1], default=None)


def example_of(example_inputs: Inputs, place: int | str) -> Int[Tensor, "rows *length"]:
    """The tokens among example inputs."""
    found: Tensor = _arguments(arguments_of(example_inputs))[place]
    return found


def random_rows(
    example: Int[Tensor, "rows *length"], vocabulary: int, count: int, *, seed: int = 0
) -> Int[Tensor, "count *length"]:
    """Uniformly drawn tokens; the first and last of every row, which often mark its ends, are the example's."""
    drawn = torch.randint(vocabulary, (count, *example.shape[1:]), generator=torch.Generator().manual_seed(seed))
    rows = example[torch.arange(count, device=example.device) % len(example)].clone()
    rows[:, 1:-1] = drawn[:, 1:-1].to(rows)
    return rows


def writes(model: nn.Module, example: Tensor) -> bool:
    """Whether a model continues rows of tokens like the example's, each from its first on."""
    config: Any = getattr(model, "config", None)
    able = getattr(model, "can_generate", None)
    if not (callable(able) and able()) or getattr(config, "is_encoder_decoder", False) or example.ndim != 2:
        return False
    try:
        return _continued(model, example[:1, :1].cpu(), 2).shape == (1, 2)
    except Exception:  # what a model does not support is of many kinds
        return False


def written_rows(
    model: nn.Module,
    example: Int[Tensor, "rows length"],
    vocabulary: int,
    count: int,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Int[Tensor, "count length"]:
    """Tokens that a model writes by its own distribution, from a first one that is drawn uniformly."""
    first = torch.randint(vocabulary, (count, 1), generator=torch.Generator().manual_seed(seed))
    rows, done = [], 0
    for part in first.chunk(math.ceil(count / IN_PASS)):
        progress("writing inputs", done, count)
        rows.append(_continued(model, part, example.shape[1], seed=seed + done))
        done += len(part)
    progress("writing inputs", done, count)
    return torch.cat(rows).to(example)


def with_written(
    model: nn.Module, rows: Int[Tensor, "rows length"], share: float, *, seed: int = 0, progress: Progress = silent
) -> Int[Tensor, "rows length"]:
    """Blocks of a text, a share of them, evenly spaced, replaced by what the model writes itself.

    What is fitted to one text alone is worse on others: on SmolLM2 half of each halves what a second text loses, and
    costs the first one next to nothing. Raises DataError for a model that does not write.
    """
    if not share:
        return rows
    found = tokens_of(model, rows[:1]) if writes(model, rows) else None
    if found is None:
        raise DataError(f"{type(model).__name__} does not predict the next token, so it writes no text to calibrate on")
    count = max(1, round(share * len(rows)))
    places = [k for k in range(len(rows)) if (k + 1) * count // len(rows) > k * count // len(rows)]
    rows = rows.clone()
    rows[places] = written_rows(model, rows[:1], found[1], count, seed=seed, progress=progress).to(rows)
    return rows


def batches_like(example_inputs: Inputs, place: int | str, rows: Tensor, batch_size: int) -> list[Inputs]:
    """Batches of tokens, with all other arguments those of the example's rows, in turn."""
    given = _arguments(arguments_of(example_inputs))
    length = len(given[place])
    batches: list[Inputs] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        chosen = torch.arange(start, start + len(part)) % length
        batch = {
            key: value[chosen.to(value.device)] if isinstance(value, Tensor) and value.shape[:1] == (length,) else value
            for key, value in given.items()
        }
        batch[place] = part
        batches.append({str(k): v for k, v in batch.items()} if isinstance(place, str) else tuple(batch.values()))
    return batches


def _continued(model: nn.Module, first: Tensor, length: int, *, seed: int = 0) -> Tensor:
    """Rows of so many tokens, the first of each given, on the CPU."""
    if length < 2:
        return first[:, :length]
    first = first.to(device_of(model))
    with evaluating(model), seeded(model, seed), torch.no_grad():
        found: Tensor = cast(Any, model).generate(
            input_ids=first,
            attention_mask=torch.ones_like(first),
            max_new_tokens=length - 1,
            do_sample=False,
            repetition_penalty=1.0,
            num_beams=1,
            pad_token_id=0,
            logits_processor=[Drawn(model, seed)],
        )
    return found[:, :length].cpu()


def _arguments(given: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[int | str, Any]:
    """What a model is called with, by position or name."""
    args, kwargs = given
    return dict(cast(Any, [*enumerate(args), *kwargs.items()]))
