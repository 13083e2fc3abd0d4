"""The commands that fine-tune a compressed network and make the last file of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.cli.options import Json, print_json, progress_bars
from rankfold.errors import TrainingError
from rankfold.reports import tables
from rankfold.reports.layout import show


def finetune(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that compress or finetune wrote.")],
    data: Annotated[
        str,
        typer.Option(
            help="Training data: npz:PATH, imagefolder:DIR, module:factory, text:FILE for language models, or "
            "synthetic:COUNT, made from the original."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the result; OUT.training holds the checkpoint and the log.")],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 30,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Examples per step, of all processes together; default 128, or 4 blocks of text."),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a block of text.")] = 512,
    optimiser: Annotated[str | None, typer.Option(help="sgd or adamw; default sgd, on text adamw.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Learning rate after the warm-up, then along a cosine to zero; default 0.003, on text 1e-4."),
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of everything but biases and norms.")] = 5e-4,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for none.")] = 20.0,
    ema: Annotated[
        float, typer.Option(help="Decay per step of an average of the weights, such as 0.999; 0: none.")
    ] = 0.0,
    augment: Annotated[
        str, typer.Option(help="none, cifar (crop and mirror) or imagenet (random resized crop).")
    ] = "none",
    cutmix: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the batches of images with a box of each from another; no labels."),
    ] = 0.0,
    as_evaluated: Annotated[
        bool, typer.Option("--as-evaluated", help="Batch norms keep their statistics, and there is no dropout.")
    ] = False,
    damping: Annotated[
        float,
        typer.Option(min=0, help="How far the terms of CP layers are kept from cancelling, before training; 0: not."),
    ] = 3e-4,
    scaled: Annotated[bool, typer.Option(help="SGD along the gradients of what the factors stand for.")] = True,
    precision: Annotated[str, typer.Option(help="auto, no or bf16.")] = "auto",
    task: Annotated[float, typer.Option(help="Weight of the loss on labels.")] = 1.0,
    logits: Annotated[float, typer.Option(help="Weight of the distance from the teacher's softened outputs.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Temperature they are softened at.")] = 4.0,
    layer_weights: Annotated[float, typer.Option(help="Weight of the distances between layers' weights.")] = 0.0,
    layer_outputs: Annotated[float, typer.Option(help="Weight of the distances between layers' outputs.")] = 0.0,
    block_outputs: Annotated[float, typer.Option(help="Weight of the distances between blocks' outputs.")] = 0.0,
    reduction: Annotated[str, typer.Option(help="mean or sum, of the two distances by layer.")] = "mean",
    labels: Annotated[bool, typer.Option(help="Use labels; without, the teacher alone.")] = True,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="Examples never trained on; default a tenth, 5,000 at most.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Test data, read once, at the end.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Another teacher, as a MODEL; default: the original.")] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="The other teacher's weights.")] = None,
    weights: Annotated[Path | None, typer.Option(help="The original's weights, if they have moved.")] = None,
    minutes: Annotated[float, typer.Option(help="How old a checkpoint may be, besides that of every epoch.")] = 10.0,
    patience: Annotated[
        int, typer.Option(min=0, help="Stop after so many epochs without a better held-out score, and keep the best.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the order, the augmentation and what is held out.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in OUT.training.")] = False,
    as_json: Json = False,
) -> None:
    """Recover accuracy by training on data, taught by the original network."""
    from rankfold.fine_tuning import fine_tune_saved
    from rankfold.reports.page import write_page
    from rankfold.sources.text import is_text
    from rankfold.training import Losses, Training
    from rankfold.training.settings import TEXT

    if (teacher is None) != (teacher_weights is None):
        raise TrainingError("--teacher and --teacher-weights go together; give both, or neither for the original")
    given = {"batch_size": batch_size, "optimiser": optimiser, "rate": rate}
    said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    training = Training(
        **{**(TEXT if is_text(data) else {}), **said},
        epochs=epochs,
        weight_decay=weight_decay,
        clip=clip,
        damping=damping,
        scaled=scaled,
        ema=ema,
        augment=augment,
        cutmix=cutmix,
        as_evaluated=as_evaluated,
        precision=precision,
        minutes=minutes,
        patience=patience,
        seed=seed,
    )
    losses = Losses(task, logits, temperature, layer_weights, layer_outputs, block_outputs, reduction)
    with progress_bars(as_json) as progress:
        found = fine_tune_saved(
            directory,
            data,
            out,
            training=training,
            losses=losses,
            labels=labels,
            held_out=held_out,
            test=test,
            teacher=(teacher, teacher_weights) if teacher and teacher_weights else None,
            weights=weights,
            length=length,
            resume=resume,
            progress=progress,
        )
    if not found.main:
        return
    write_page(found.out)
    if as_json:
        print_json(found.as_dict())
    else:
        show(tables.fine_tuning(found))


def finalize(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that compress or finetune wrote.")],
    out: Annotated[Path, typer.Option(help="A file that ends in .pt2 or .onnx, or a directory.")],
    as_json: Json = False,
) -> None:
    """Write a model for deployment: a file for torch.export.load or ONNX Runtime, or a directory for transformers.

    The file has batch norms folded and needs no rankfold; one that ends in .onnx is timed beside the original's. The
    directory is for a Hugging Face model, and is loaded by from_pretrained.
    """
    from rankfold.files.export import finalize as write_program
    from rankfold.files.pretrained import finalize_pretrained

    if not out.suffix:
        path = finalize_pretrained(directory, out)
        if as_json:
            print_json({"path": str(path), "bytes": sum(one.stat().st_size for one in path.iterdir())})
        else:
            show(tables.pretrained(path))
        return
    found = write_program(directory, out)
    if as_json:
        print_json(found.as_dict())
    else:
        show(tables.exported(found))
