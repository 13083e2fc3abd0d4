"""Options that several commands have, and how they are read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rankfold.errors import DataError, ModelError

if TYPE_CHECKING:
    from torch import nn

    from rankfold.network.passes import Inputs
    from rankfold.sources.models import Source

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="zoo:NAME, timm:NAME, torchvision:NAME, hf:NAME or hf:DIR, package.module:factory or file.py:factory",
    ),
]
Weights = Annotated[Path | None, typer.Option(help="The network's weights: .safetensors, or a .pt/.pth state dict.")]
InputShape = Annotated[
    str | None, typer.Option(help="Shape of one input, such as 3,32,32; default: the model's own, where it is known.")
]
Decompositions = Annotated[
    list[str] | None,
    typer.Option(
        "--decomposition",
        "-d",
        help="svd, spatial, tucker, tt, cp, cp3, ring, or interpolative (fewer channels between layers); "
        "several with commas, or auto, for the best of all per layer; by default cp3,interpolative, or "
        "spatial,interpolative for a limit on the latency (analyze: auto, compress-files: svd); "
        "PATTERN=NAME for the layers a glob matches (repeatable).",
    ),
]
Include = Annotated[list[str] | None, typer.Option(help="Glob of layers to consider (repeatable); default: all.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Glob of layers to leave alone (repeatable).")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, and nothing else.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto: a CUDA GPU where there is one.")]
Seed = Annotated[int, typer.Option(help="Seed of the initial weights, where no weights are given.")]

_BATCH = 128
BLOCKS_IN_BATCH = 4
"""Blocks of text in a pass, or in a step of refining, unless said otherwise."""


def open_model(
    spec: str, weights: Path | None, input_shape: str | None, seed: int
) -> tuple[Source, Any, tuple[int, ...] | None]:
    """The network with its weights, an example batch of one, and the shape of one input (None where it takes several).

    What there is to say of its weights goes to standard error.
    """
    from rankfold.sources.models import build_model, load_weights_

    source = build_model(spec, seed=seed)
    if weights:
        load_weights_(source.model, weights)
    elif source.note:
        print(f"rankfold: {source.note}", file=sys.stderr)
    if input_shape:
        shape = read_shape(input_shape)
        return source, source.example(shape), shape
    if source.input_shape is None and source.inputs is None:
        raise ModelError(f"{spec} does not say what inputs it takes; give --input-shape, for example 3,224,224")
    return source, source.example_inputs(), source.input_shape


def several() -> bool:
    """Whether `torchrun` started other processes with this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def joined() -> bool:
    """Joins the processes that `torchrun` started with this one, if it did; whether this is the one that writes."""
    from rankfold.sharing import place

    if several():
        from rankfold.training.preparation import processes

        processes()
    return place()[0] == 0


def as_timed_(
    model: nn.Module, example: Inputs, *, device: str, batch: int, channels_last: bool, threads: int | None
) -> Inputs:
    """Example inputs as passes over them are timed; the model and PyTorch are set up for it."""
    import torch

    from rankfold.network.passes import mapped
    from rankfold.sources.devices import open_device

    place = open_device(device)
    if threads:
        torch.set_num_threads(threads)
    model.to(place)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]

    def formed(one: Any) -> Any:
        one = one.to(place)
        one = one.repeat_interleave(batch, 0) if one.ndim else one
        return one.contiguous(memory_format=torch.channels_last) if channels_last and one.ndim == 4 else one

    return mapped(example, formed)


def examples(spec: str, samples: int, source: Source, shape: tuple[int, ...] | None) -> Iterator[tuple[Any, Any]]:
    """Batches of evenly spaced examples with their labels."""
    from rankfold.files.original import one_input
    from rankfold.sources.data import open_dataset

    shape = one_input(shape, spec)
    chosen = open_dataset(spec, shape, source.normalised_by(shape[0])).sample(samples)
    for start in range(0, len(chosen), _BATCH):
        yield chosen.batch(start, start + _BATCH)


def read_shape(text: str) -> tuple[int, ...]:
    """The shape of one input, from text such as 3,32,32."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ModelError(f"--input-shape {text!r} is not a list of positive sizes such as 3,32,32")
    return shape


def numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    """The numbers of an option called `name`, from text such as 0.5,0.5,0.5; None where it is not given."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"--{name} {text!r} is not a list of numbers such as 0.5,0.5,0.5") from None


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Any]:
    """A progress callback that draws one bar per activity on standard error, and takes them away at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:

        def report(what: str, done: int, total: int, note: str = "", /) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], description=f"{what} ({note})" if note else what, completed=done, total=total)

        yield report


def print_json(content: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(content, indent=2, ensure_ascii=False))


def decompositions(given: Sequence[str]) -> Any:
    """What --decomposition says: a name, several, or a mapping from patterns."""
    if any("=" in text for text in given):
        pairs = [text.partition("=") for text in given]
        bare = [text for text, separator, _ in pairs if not separator]
        if bare:
            raise ModelError(f"--decomposition {bare[0]!r} has no pattern, others have; write '*={bare[0]}' last")
        return {pattern: _split(names) for pattern, _, names in pairs}
    return _split(",".join(given))


def _split(names: str) -> str | list[str]:
    parts = [part.strip() for part in names.split(",") if part.strip()]
    return parts[0] if len(parts) == 1 else parts
