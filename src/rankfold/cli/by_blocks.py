"""The command that compresses a model from files to files, a block at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.cli.options import BLOCKS_IN_BATCH, Decompositions, Json, decompositions, print_json, progress_bars
from rankfold.reports import tables
from rankfold.reports.layout import show


def compress_files(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A directory of transformers: config.json and safetensors files.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write, for from_pretrained after import rankfold.")],
    budget: Annotated[
        list[str], typer.Option("--budget", "-b", help="UNIT=LIMIT: params=0.7, bytes=4GB or macs=0.7 (repeatable).")
    ],
    decomposition: Decompositions = None,
    calibration: Annotated[
        str | None, typer.Option(help="text:FILE to calibrate on, by the model's own tokenizer; default random tokens.")
    ] = None,
    calibration_samples: Annotated[int, typer.Option(min=1, help="Blocks of text, evenly spaced.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a block.")] = 512,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Limit to what is taken besides a block and what reaches it: 4GB; default half of what is free."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is done beside OUT if stopped, and go on from the last block.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compress a model that does not fit into memory: its blocks are read, fitted and written one by one."""
    from rankfold.budget import Budget
    from rankfold.files.by_blocks import compress_files as run

    batches = _blocks_of(directory, calibration, calibration_samples, length) if calibration else None
    with progress_bars(as_json) as progress:
        plan = run(
            directory,
            out,
            budget=Budget.parse(budget),
            decomposition=decompositions(decomposition or ["svd"]),
            calibration=batches,
            memory=memory,
            resume=resume,
            progress=progress,
        )
    if as_json:
        print_json({"path": str(out), "before": plan.before.as_dict(), "after": plan.after.as_dict()})
    else:
        show(tables.totals(plan.before, plan.after), tables.pretrained(out))


def _blocks_of(directory: Path, spec: str, samples: int, length: int) -> list[Any]:
    """Blocks of a text's tokens, in passes of a few."""
    from rankfold.sources.hugging_face import tokenize
    from rankfold.sources.models import optional
    from rankfold.sources.text import open_text

    transformers = optional("transformers", "hf")
    return list(
        open_text(spec, partial(tokenize, transformers, str(directory)), length, samples).rows.split(BLOCKS_IN_BATCH)
    )
