"""The command line: parse, call, print. Every command is one function of the library and a table or an object."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rankfold import tables
from rankfold.errors import BudgetError, DataError, ModelError, RankfoldError

if TYPE_CHECKING:
    from rankfold.models import Source
    from rankfold.search import Search

app = typer.Typer(
    name="rankfold",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Smaller, ordinary PyTorch models from pre-trained ones, by low-rank and tensor decomposition.",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="zoo:NAME, timm:NAME, torchvision:NAME, hf:NAME, package.module:factory or path/to/file.py:factory",
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
        help="svd, spatial, tucker, tt, cp, cp3, ring; several with commas, or auto, for the best per layer; "
        "PATTERN=NAME for the layers a glob matches (repeatable).",
    ),
]
Include = Annotated[list[str] | None, typer.Option(help="Glob of layers to consider (repeatable); default: all.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Glob of layers to leave alone (repeatable).")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, and nothing else.")]
Seed = Annotated[int, typer.Option(help="Seed of the initial weights, where no weights are given.")]

errors = Console(stderr=True)

OBJECTIVES = ("reconstruction", "divergence", "validation")
_BATCH = 128

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""The parser's own errors; typer carries its parser inside from 0.20 on, and none of its names is public."""


@app.command()
def analyze(
    model: Model,
    weights: Weights = None,
    input_shape: InputShape = None,
    decomposition: Decompositions = None,
    include: Include = None,
    exclude: Exclude = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Show every layer, what it costs, and what each decomposition could save on it."""
    from rankfold.analysis import analyze as run_analysis

    source, example, _ = _open_model(model, weights, input_shape, seed)
    with _progress(as_json) as progress:
        report = run_analysis(
            source.model,
            example,
            decomposition=_decompositions(decomposition or ["auto"]),
            include=include or None,
            exclude=exclude or (),
            progress=progress,
        )
    if as_json:
        _print_json(report.as_dict())
    else:
        Console().print(tables.analysis(report))


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write plan.json, model.safetensors and metrics.json to.")],
    budget: Annotated[
        list[str],
        typer.Option(
            "--budget",
            "-b",
            help="UNIT=LIMIT: macs=0.5, params=300k, bytes=12MB (repeatable); or error=0.05, the mean squared relative "
            "error of the layers, for the cheapest plan (minimise=UNIT, default macs).",
        ),
    ],
    weights: Weights = None,
    input_shape: InputShape = None,
    decomposition: Decompositions = None,
    search: Annotated[
        str, typer.Option(help="How ranks are found: exact, rene, greedy, evbmf, energy or uniform.")
    ] = "exact",
    objective: Annotated[
        str, typer.Option(help="What rene lowers: reconstruction, divergence (from the original) or validation.")
    ] = "reconstruction",
    data: Annotated[
        str | None, typer.Option(help="Inputs for the objective: npz:PATH, imagefolder:DIR or module:factory.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many of them are used, evenly spaced.")] = 512,
    calibration: Annotated[
        str,
        typer.Option(
            help="Inputs by whose outputs errors are measured: none, for errors of the weights; synthetic, made from "
            "the network; npz:PATH, imagefolder:DIR or module:factory, labels ignored; auto, synthetic where it helps."
        ),
    ] = "auto",
    calibration_samples: Annotated[
        int | None, typer.Option(min=1, help="How many inputs, evenly spaced; default 512, fewer made of large ones.")
    ] = None,
    sequential: Annotated[
        bool,
        typer.Option(help="Fit layers once more, in forward order, to the original's outputs from compressed inputs."),
    ] = True,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File that rene keeps its state in, and goes on from when started again.")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make a smaller model within a budget, and save it."""
    from rankfold.artifact import check_target, digest, save
    from rankfold.budget import Budget
    from rankfold.pipeline import compress as run_compression

    limits = Budget.parse(budget)
    check_target(out)
    source, example, shape = _open_model(model, weights, input_shape, seed)
    finder = _search(search, objective, source, shape, data=data, samples=samples, checkpoint=checkpoint)
    with _progress(as_json) as progress:
        result = run_compression(
            source.model,
            example,
            decomposition=_decompositions(decomposition or ["tucker"]),
            budget=limits,
            search=finder,
            calibration=_calibration(calibration, calibration_samples, source, shape),
            calibration_samples=calibration_samples,
            sequential=sequential,
            include=include or None,
            exclude=exclude or (),
            progress=progress,
        )
    origin: dict[str, Any] = {"model": model, "input_shape": list(shape), "seed": seed}
    if weights:
        origin |= {"weights": str(weights.absolute()), "weights_sha256": digest(weights)}
    path = save(result, out, source=origin)
    if as_json:
        _print_json(tables.compression_dict(result, path))
    else:
        Console().print(tables.compression(result, path))


@app.command()
def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that compress wrote.")],
    data: Annotated[str, typer.Option(help="npz:PATH (arrays x and y), imagefolder:DIR or module:factory.")],
    original: Annotated[bool, typer.Option("--original", help="Score the original network as well.")] = False,
    weights: Annotated[Path | None, typer.Option(help="The original's weights, if they have moved.")] = None,
    mean: Annotated[str | None, typer.Option(help="Mean per channel of inputs in [0, 1]: 0.5,0.5,0.5.")] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation per channel of inputs in [0, 1].")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs per batch.")] = 250,
    as_json: Json = False,
) -> None:
    """Score a compressed model on labelled data, and time it against its original in one run."""
    from rankfold.comparison import compare

    with _progress(as_json) as progress:
        report = compare(
            directory,
            data,
            original=original,
            weights=weights,
            mean=_numbers(mean, "mean"),
            std=_numbers(std, "std"),
            batch_size=batch_size,
            progress=progress,
        )
    if as_json:
        _print_json(report.as_dict())
    else:
        Console().print(tables.comparison(report))


@app.command()
def demo(as_json: Json = False) -> None:
    """Compress the embedded digits network at several budgets, and show what becomes of it."""
    from rankfold.demo import demonstrate

    start = time.perf_counter()
    with _progress(as_json) as progress:
        rows = demonstrate(progress)
    if as_json:
        _print_json({"rows": [tables.demo_row_dict(row) for row in rows], "seconds": time.perf_counter() - start})
    else:
        Console().print(tables.demo(rows, time.perf_counter() - start))


def main() -> None:
    """Runs the command line. Exits with 2 for what the user got wrong, 1 for a defect, without a traceback."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing was written", 130)
    except RankfoldError as error:
        _fail(str(error), 2)
    except UsageError as error:
        message = getattr(error, "message", "")
        if message:
            _fail(message, 2)
        sys.exit(0)  # called without arguments, it has shown its help
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("RANKFOLD_TRACEBACK"):
            raise
        _fail(f"{type(error).__name__}: {error} (a defect; set RANKFOLD_TRACEBACK=1 for where)", 1)


def _fail(message: str, code: int) -> None:
    print(f"rankfold: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _open_model(
    spec: str, weights: Path | None, input_shape: str | None, seed: int
) -> tuple[Source, Any, tuple[int, ...]]:
    """The network with its weights, an example batch of one, and the shape of one input."""
    from rankfold.models import build_model, load_weights_

    source = build_model(spec, seed=seed)
    if weights:
        load_weights_(source.model, weights)
    shape = _shape(input_shape) if input_shape else source.input_shape
    if shape is None:
        raise ModelError(f"{spec} does not say what inputs it takes; give --input-shape, for example 3,224,224")
    return source, source.example(shape), shape


def _calibration(spec: str, samples: int | None, source: Source, shape: tuple[int, ...]) -> str | list[Any]:
    """What `compress` is to calibrate on: a way to make inputs, by name, or batches of data."""
    from rankfold.synthetic import SAMPLES

    if spec in ("auto", "none", "synthetic"):
        return spec
    return [x for x, _ in _examples(spec, samples or SAMPLES, source, shape)]


def _examples(spec: str, samples: int, source: Source, shape: tuple[int, ...]) -> Iterator[tuple[Any, Any]]:
    """Batches of evenly spaced examples with their labels."""
    from rankfold.data import open_dataset

    examples = open_dataset(spec, shape, source.normalised_by(shape[0])).sample(samples)
    for start in range(0, len(examples), _BATCH):
        yield examples.batch(start, start + _BATCH)


def _search(
    name: str,
    objective: str,
    source: Source,
    shape: tuple[int, ...],
    *,
    data: str | None,
    samples: int,
    checkpoint: Path | None,
) -> str | Search:
    """The search that the options of compress describe."""
    from rankfold.errors import UnknownNameError
    from rankfold.objectives import Divergence, Validation
    from rankfold.search import Rene

    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    if name != "rene":
        if objective != OBJECTIVES[0] or checkpoint:
            raise BudgetError(f"--objective and --checkpoint are for --search rene, not {name}")
        return name
    if objective == OBJECTIVES[0]:
        if data is not None:
            raise BudgetError("--data is for --objective divergence or validation")
        return Rene(checkpoint=checkpoint)
    if data is None:
        raise DataError(f"--objective {objective} needs inputs; give them with --data, for example npz:train.npz")
    pairs = list(_examples(data, samples, source, shape))
    if objective == "validation":
        return Rene(objective=Validation(source.model, pairs), checkpoint=checkpoint)
    return Rene(objective=Divergence(source.model, [x for x, _ in pairs]), checkpoint=checkpoint)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ModelError(f"--input-shape {text!r} is not a list of positive sizes such as 3,32,32")
    return shape


def _numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"--{name} {text!r} is not a list of numbers such as 0.5,0.5,0.5") from None


def _decompositions(given: Sequence[str]) -> Any:
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


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """A progress callback that draws one bar per activity on standard error, and takes them away at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=errors, transient=True, disable=quiet or not errors.is_terminal) as bars:

        def report(what: str, done: int, total: int, note: str = "", /) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], description=f"{what} ({note})" if note else what, completed=done, total=total)

        yield report


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))
