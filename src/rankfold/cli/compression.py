"""The commands that look at a network and compress it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from rankfold.cli.described import calibration_of, search_of, training_of
from rankfold.cli.options import (
    BLOCKS_IN_BATCH,
    Decompositions,
    Device,
    Exclude,
    Include,
    InputShape,
    Json,
    Model,
    Seed,
    Weights,
    as_timed_,
    decompositions,
    joined,
    open_model,
    print_json,
    progress_bars,
    several,
)
from rankfold.errors import BudgetError, DataError
from rankfold.reports import tables
from rankfold.reports.layout import show

if TYPE_CHECKING:
    from rankfold.budget import Budget

TIMED = 3.0
"""Seconds in which the result is timed beside its original, about."""


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
    from rankfold.reports.analysis import analyze as run_analysis

    source, example, _ = open_model(model, weights, input_shape, seed)
    with progress_bars(as_json) as progress:
        report = run_analysis(
            source.model,
            example,
            decomposition=decompositions(decomposition) if decomposition else None,
            include=include or None,
            exclude=exclude or (),
            progress=progress,
        )
    if as_json:
        print_json(report.as_dict())
    else:
        show(tables.analysis(report))


def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write plan.json, model.safetensors and metrics.json to.")],
    budget: Annotated[
        list[str],
        typer.Option(
            "--budget",
            "-b",
            help="UNIT=LIMIT: macs=0.5, params=300k, bytes=12MB, latency=0.6 or latency=8ms, on this machine "
            "(repeatable); or error=0.05, the mean squared relative error of the layers, for the cheapest plan "
            "(minimise=UNIT, default macs).",
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
            "the network; npz:PATH, imagefolder:DIR or module:factory, labels ignored; text:FILE, for language "
            "models; auto, synthetic where it helps."
        ),
    ] = "auto",
    calibration_samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many inputs, evenly spaced; default 512, fewer made of large ones, 128 blocks of text."
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a block of text.")] = 512,
    written: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of the blocks of text that the model writes itself, so that it is not fitted to one text.",
        ),
    ] = 0.0,
    sequential: Annotated[
        bool,
        typer.Option(help="Fit layers once more, in forward order, to the original's outputs from compressed inputs."),
    ] = True,
    refine: Annotated[
        int,
        typer.Option(min=0, help="Epochs of descent on the calibration inputs, block by block."),
    ] = 0,
    refine_blocks: Annotated[
        list[str] | None, typer.Option(help="Glob of the blocks to refine (repeatable); default: found on the network.")
    ] = None,
    refine_copies: Annotated[
        int, typer.Option(min=0, help="Copies of every calibration image, shifted and mirrored, to refine on as well.")
    ] = 0,
    refine_checkpoint: Annotated[
        Path | None, typer.Option(help="Folder that refined blocks are kept in, to go on from when started again.")
    ] = None,
    distil: Annotated[
        int,
        typer.Option(
            min=0,
            help="Epochs in which the whole network then learns from the original on the calibration inputs, without "
            "labels: of images what its blocks give (some 40), of text its outputs (1).",
        ),
    ] = 0,
    align: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Widths and ranks that are multiples of this; default 8 for a limit on the latency, else widths of "
            "Linear layers above 64 alone.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Limit to what is taken besides networks and inputs: 4GB; default half of what is free."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Inputs in a pass that is timed, and whose MACs are counted.")] = 1,
    channels_last: Annotated[
        bool, typer.Option(help="Images and weights with their channels last, as they are timed; often faster.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that PyTorch may use; default its own number.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Times are those of networks that torch.compile has compiled.")
    ] = False,
    device: Device = "auto",
    checkpoint: Annotated[
        Path | None, typer.Option(help="File that rene keeps its state in, and goes on from when started again.")
    ] = None,
    pictures: Annotated[
        bool, typer.Option(help="Keep small pictures of eight calibration images with the model, for its page.")
    ] = True,
    finetune: Annotated[
        str | None, typer.Option(help="Data to fine-tune on at once; what was compressed is kept in OUT.compressed.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over them.")] = 30,
    augment: Annotated[str, typer.Option(help="Augmentation of them: none, cifar or imagenet.")] = "none",
    test: Annotated[str | None, typer.Option(help="Test data, read once, after fine-tuning.")] = None,
    include: Include = None,
    exclude: Exclude = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make a smaller model within a budget, and save it; with --finetune, recover its accuracy too."""
    import torch
    from torch import nn

    from rankfold.budget import Budget
    from rankfold.calibration import Refining
    from rankfold.evaluation import latency
    from rankfold.files.artifact import save
    from rankfold.pipeline import compress as run_compression
    from rankfold.reports.page import write_page
    from rankfold.sources.text import is_text

    limits = Budget.parse(budget)
    small = out.with_name(f"{out.name}.compressed") if finetune else out
    _check(
        {out, small},
        limits,
        finetune=finetune,
        compiled=compiled,
        refined=bool(refine),
        more=bool(refine_blocks or refine_checkpoint or refine_copies),
    )
    source, example, shape = open_model(model, weights, input_shape, seed)
    example = as_timed_(source.model, example, device=device, batch=batch, channels_last=channels_last, threads=threads)
    training = training_of(finetune, test, source, shape, length, epochs=epochs, augment=augment, seed=seed)
    finder = search_of(search, objective, source, shape, data=data, samples=samples, checkpoint=checkpoint)
    main = joined()
    with progress_bars(as_json or not main) as progress:
        result = run_compression(
            cast(nn.Module, torch.compile(source.model)) if compiled else source.model,
            example,
            decomposition=decompositions(decomposition) if decomposition else None,
            budget=limits,
            search=finder,
            calibration=calibration_of(calibration, calibration_samples, (length, written), source, example, shape),
            calibration_samples=calibration_samples,
            align=align,
            sequential=sequential,
            refine=Refining(
                refine,
                tuple(refine_blocks or ()),
                batch_size=BLOCKS_IN_BATCH if is_text(calibration) else Refining.batch_size,
                copies=refine_copies,
                checkpoint=refine_checkpoint,
            ),
            distil=distil,
            memory=memory,
            include=include or None,
            exclude=exclude or (),
            progress=progress,
        )
    if not main:
        return
    origin = {"model": model, "seed": seed, **_origin(weights, shape, calibration, length, written)}
    times = latency((source.model, result.model), example, seconds=TIMED, compiled=compiled)
    timed = {"latency_ms": dict(zip(("original", "compressed"), times, strict=True))}
    if not pictures:
        result = replace(result, pictures=())
    path = save(result, small, source=origin, metrics=timed)
    write_page(path)
    told, shown = {**tables.compression_dict(result, path), **timed}, [tables.compression(result, path, times)]
    if finetune and training:
        from rankfold.fine_tuning import fine_tune_saved

        with progress_bars(as_json) as progress:
            found = fine_tune_saved(
                small, finetune, out, training=training, test=test, length=length, progress=progress
            )
        told, shown = {**told, "fine_tuning": found.as_dict()}, [*shown, tables.fine_tuning(found)]
    if as_json:
        print_json(told)
    else:
        show(*shown)


def _origin(
    weights: Path | None, shape: tuple[int, ...] | None, calibration: str, length: int, written: float
) -> dict[str, Any]:
    """What a saved model says of where its weights and its calibration inputs came from."""
    from rankfold.files.artifact import digest
    from rankfold.sources.text import is_text

    told: dict[str, Any] = {"input_shape": list(shape)} if shape else {}
    if weights:
        told |= {"weights": str(weights.absolute()), "weights_sha256": digest(weights)}
    if ":" in calibration:
        told |= {"calibration": calibration}
    if is_text(calibration):
        told |= {"length": length, **({"written": written} if written else {})}
    return told


def _check(
    targets: set[Path], limits: Budget, *, finetune: str | None, compiled: bool, refined: bool, more: bool
) -> None:
    """Raises what is to be said of places that are taken, and of options that only mean something beside others."""
    from rankfold.files.artifact import check_target

    for target in targets:
        check_target(target)
    if finetune and several():
        raise DataError("--finetune is for one process; give the result to finetune, which several may run")
    if compiled and "latency" not in limits.given:
        raise BudgetError("--compile is for a limit on the latency, for example --budget latency=0.7; leave it out")
    if more and not refined:
        raise BudgetError(
            "--refine-blocks, --refine-copies and --refine-checkpoint are for --refine EPOCHS; say how many"
        )
