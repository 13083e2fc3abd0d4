"""What a network is trained on, parts of it, and the score on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from rankfold.errors import TrainingError
from rankfold.evaluation import accuracy, perplexity
from rankfold.network.passes import Inputs, are_single, evaluating, examples_in, joined, output_of, run
from rankfold.network.passes import split as in_parts
from rankfold.progress import Progress, silent
from rankfold.sources.data import Dataset
from rankfold.sources.text import TextData
from rankfold.training.augment import darkest
from rankfold.training.distillation import apart


@dataclass(frozen=True)
class Unlabelled:
    """Inputs of any form without labels: all that a network can learn on them is what its teacher gives."""

    parts: tuple[Inputs, ...]

    @classmethod
    def of(cls, batches: Iterable[Inputs], batch_size: int) -> tuple[Unlabelled, int]:
        """The examples of some batches one by one, and how many of them a step takes.

        Those that differ in shape cannot be joined anew: they stay together as they are given, and a step takes one
        such part, of `batch_size` examples at most.
        """
        kept = list(batches)
        alone = in_parts(kept, 1)
        if are_single(alone):
            return cls(tuple(alone)), min(batch_size, max(len(alone), 1))
        return cls(tuple(in_parts(kept, batch_size))), 1

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an example, where it is one tensor."""
        first = self.parts[0]
        return tuple(first.shape[1:]) if isinstance(first, Tensor) else ()

    @property
    def black(self) -> Tensor:
        """The smallest value of every channel, where the examples are images."""
        if len(self.input_shape) != 3:
            return torch.zeros(1)
        return darkest(cast("tuple[Tensor, ...]", self.parts))

    def take(self, places: Sequence[int]) -> Unlabelled:
        """The parts at these places."""
        return Unlabelled(tuple(self.parts[place] for place in places))

    def batch(self, start: int, stop: int) -> tuple[Any, Tensor]:
        """Some parts as one, and labels, which there are none of."""
        return joined(self.parts[start:stop]), torch.empty(0)


Examples = Dataset | TextData | Unlabelled
"""What a network is trained on: labelled inputs, blocks of a text (labels are the next tokens), or inputs alone."""

BATCH = 50
"""Examples in a pass."""

Part = TypeVar("Part", bound=Examples)


def split(data: Part, held_out: int, seed: int = 0) -> tuple[Part, Part]:
    """The data without `held_out` random examples, and those; raises TrainingError where too few would be left."""
    if not 0 < held_out < len(data):
        raise TrainingError(f"{held_out} of {len(data)} examples cannot be held out; take fewer, but at least one")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    return cast(Part, data.take(sorted(order[held_out:]))), cast(Part, data.take(sorted(order[:held_out])))


def decided(data: Examples | None, model: nn.Module) -> Examples | None:
    """The same inputs with the classes that a model puts first as their labels: top-1 on them is agreement with it.

    Blocks of text stay as they are. Raises TrainingError for a model that does not give a row of logits per input.
    """
    if not isinstance(data, Dataset):
        return data
    device, dtype = next((p.device, p.dtype) for p in model.parameters() if p.is_floating_point())
    found = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(data), BATCH):
            x, _ = data.batch(start, start + BATCH)
            logits = output_of(model(x.to(device, dtype)))
            if logits.ndim != 2:
                raise TrainingError(
                    "the teacher's output is not a row of logits per input; hold nothing out, without patience"
                )
            found.append(logits.argmax(-1).cpu())
    return replace(data, y=torch.cat(found).numpy())


def score_of(
    model: nn.Module,
    data: Examples,
    *,
    teacher: nn.Module | None = None,
    progress: Progress = silent,
    what: str = "scoring",
) -> float:
    """Top-1 in percent on labelled inputs; of text the perplexity; on inputs alone how far it is from its teacher."""
    if isinstance(data, TextData):
        return perplexity(model, data.rows, progress=progress, what=what).value
    if isinstance(data, Unlabelled):
        with torch.no_grad():
            sizes = [examples_in(part) for part in data.parts]
            lost = [float(apart(run(model, part), run(cast(nn.Module, teacher), part))) for part in data.parts]
        return sum(one * size for one, size in zip(lost, sizes, strict=True)) / sum(sizes)
    return accuracy(model, data, progress=progress, what=what).top1
