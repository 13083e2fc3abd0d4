"""The commands that show what a compressed network is worth."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.cli.options import Device, Json, numbers, print_json, progress_bars
from rankfold.errors import ArtifactError
from rankfold.reports import tables
from rankfold.reports.layout import show


def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that compress wrote.")],
    data: Annotated[
        str,
        typer.Option(
            help="npz:PATH (arrays x and y), imagefolder:DIR, module:factory, text:FILE, or pairs:FILE, a table of "
            "sentence, sentence, score."
        ),
    ],
    original: Annotated[bool, typer.Option("--original", help="Score the original network as well.")] = False,
    weights: Annotated[Path | None, typer.Option(help="The original's weights, if they have moved.")] = None,
    mean: Annotated[str | None, typer.Option(help="Mean per channel of inputs in [0, 1]: 0.5,0.5,0.5.")] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation per channel of inputs in [0, 1].")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Inputs per batch; by default up to 250, fewer of large ones.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Of text: tokens in a block.")] = 1024,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Of text: so many evenly spaced blocks; default all.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a compressed model on labelled data or on text, and time it against its original in one run.

    On text both are scored by perplexity, and by how many tokens they read and write per second; on pairs of sentences
    by how their similarities agree with the scores (Spearman's correlation).
    """
    from rankfold.reports.comparison import (
        Comparison,
        LanguageComparison,
        SimilarityComparison,
        compare_on_pairs,
        compare_on_text,
    )
    from rankfold.reports.comparison import compare as compare_on_data
    from rankfold.reports.comparison_tables import comparison
    from rankfold.sources.pairs import is_pairs
    from rankfold.sources.text import is_text

    found: Comparison | LanguageComparison | SimilarityComparison
    with progress_bars(as_json) as progress:
        if is_text(data):
            found = compare_on_text(
                directory, data, length=length, samples=samples, weights=weights, device=device, progress=progress
            )
        elif is_pairs(data):
            found = compare_on_pairs(directory, data, weights=weights, device=device, progress=progress)
        else:
            found = compare_on_data(
                directory,
                data,
                original=original,
                weights=weights,
                mean=numbers(mean, "mean"),
                std=numbers(std, "std"),
                batch_size=batch_size,
                device=device,
                progress=progress,
            )
    _keep(directory, data, found.as_dict())
    if as_json:
        print_json(found.as_dict())
    else:
        show(comparison(found))


def _keep(directory: Path, data: str, found: dict[str, Any]) -> None:
    """Keeps what was found beside the model, and shows it on its page, where the directory can be written to."""
    from rankfold.files.artifact import save_evaluation
    from rankfold.reports.page import write_page

    with suppress(ArtifactError):
        save_evaluation(directory, data, found)
        write_page(directory)


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that compress or finetune wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page's file; default: report.html in the directory.")] = None,
    as_json: Json = False,
) -> None:
    """Show on one page, a file of its own, what was done to a network: sizes, layers, curves, search and settings."""
    from rankfold.reports.page import write_page

    path = write_page(directory, out)
    if as_json:
        print_json({"page": str(path), "bytes": path.stat().st_size})
    else:
        print(path)


def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR DIR...", help="Directories of results.")],
    out: Annotated[Path, typer.Option(help="The page's file.")] = Path("compare.html"),
    as_json: Json = False,
) -> None:
    """Put several results on one page: what each costs, and what it scored on data that all were evaluated on."""
    from rankfold.reports.page import write_front

    path = write_front(directories, out)
    if as_json:
        print_json({"page": str(path), "bytes": path.stat().st_size})
    else:
        print(path)


def demo(as_json: Json = False) -> None:
    """Compress the embedded digits network at several budgets, and show what becomes of it."""
    from rankfold.reports.demo import demonstrate

    start = time.perf_counter()
    with progress_bars(as_json) as progress:
        rows = demonstrate(progress)
    if as_json:
        print_json({"rows": [tables.demo_row_dict(row) for row in rows], "seconds": time.perf_counter() - start})
    else:
        show(tables.demo(rows, time.perf_counter() - start))
