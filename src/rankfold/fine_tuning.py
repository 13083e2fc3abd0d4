"""From one saved model to a better one: fine-tuning of a directory that `compress` wrote, taught by its original."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rankfold.calibration.synthetic import synthetic_inputs
from rankfold.decompositions import relative_error, wiring_of
from rankfold.decompositions.metric import IDENTITY
from rankfold.errors import DataError
from rankfold.evaluation import latency
from rankfold.files.artifact import check_target, digest, load, load_plan, save
from rankfold.files.original import load_original_, one_input, rebuild
from rankfold.network.kinds import shape_of, stage_factors, weight_of
from rankfold.network.narrowing import narrowed_error
from rankfold.network.surgery import opened_for
from rankfold.pipeline import Result
from rankfold.plan import LayerPlan, Plan
from rankfold.progress import Progress, silent
from rankfold.sources.data import Dataset, Normalisation, open_dataset
from rankfold.sources.models import Source, build_model, load_weights_
from rankfold.sources.text import TextData, is_text, open_text
from rankfold.training import Epoch, Losses, Training, fine_tune, split
from rankfold.training.examples import Examples, decided, score_of
from rankfold.training.preparation import processes

SYNTHETIC = "synthetic:"
STAGES = ("original", "compressed", "fine-tuned")


@dataclass(frozen=True)
class FineTuning:
    """What became of a model: top-1 in percent on held-out training data, and on test data where they were given.

    Of text it is the perplexity, and without labels agreement with the teacher in percent, as `measure` says.

    Accuracies and latencies (median milliseconds of a batch of one, in turns) are those of `STAGES`, in this order;
    accuracies are empty where nothing was held out, or given to test on. `main` is false in processes that only help.
    """

    plan: Plan
    held_out: tuple[float, ...]
    test: tuple[float, ...]
    latencies_ms: tuple[float, ...]
    epochs: tuple[Epoch, ...]
    precision: str
    seconds: float
    out: Path
    main: bool = True
    measure: str = "top1"

    @property
    def test_measure(self) -> str:
        """What networks are scored by on test data, which have labels."""
        return "top1" if self.measure == "agreement" else self.measure

    def as_dict(self) -> dict[str, Any]:
        """The outcome in JSON's types."""
        return {
            f"held_out_{self.measure}": dict(zip(STAGES, self.held_out, strict=False)),
            f"test_{self.test_measure}": dict(zip(STAGES, self.test, strict=False)),
            "latency_ms": dict(zip(STAGES, self.latencies_ms, strict=True)),
            "before": self.plan.before.as_dict(),
            "after": self.plan.after.as_dict(),
            "kept": self.plan.after.kept(self.plan.before),
            "epochs": [asdict(one) for one in self.epochs],
            "precision": self.precision,
            "seconds": self.seconds,
            "out": str(self.out),
        }


def fine_tune_saved(
    directory: str | Path,
    data: str,
    out: str | Path,
    *,
    training: Training | None = None,
    losses: Losses | None = None,
    labels: bool = True,
    held_out: int | None = None,
    test: str | None = None,
    teacher: tuple[str, str | Path] | None = None,
    weights: str | Path | None = None,
    length: int = 512,
    resume: bool = False,
    progress: Progress = silent,
) -> FineTuning:
    """Fine-tunes the model saved in `directory` on `data` and saves it to `out`; the original is its teacher.

    `data` is what `open_dataset` takes, "synthetic:COUNT" for inputs made from the original, which have no labels, or
    "text:FILE" for a language model: blocks of `length` tokens, whose next tokens are the labels.
    `held_out` examples of the data, a tenth but at most 5,000 by default, are kept for scores after every epoch and
    never trained on; without labels only where they are asked for, or there is a patience, and scores are then how
    often a network agrees with its teacher; `test` is read once, at the end. `teacher` is another teacher, a MODEL and
    the file of its weights. Beside `out` stands the folder OUT.training with the checkpoint, from which `resume` goes
    on, and log.csv.
    The saved plan lists under "fine_tunings" the settings of this run after those of any before it.
    """
    training, losses = training or Training(), losses or Losses()
    target = Path(out).absolute()
    check_target(target)
    start = time.perf_counter()
    plan = load_plan(directory)
    source, shape = rebuild(plan, directory)
    student = load(directory, source.model)
    load_original_(source.model, plan, weights)
    made = synthetic_count(data)
    if made is not None:
        one = one_input(shape, data)
        everything: Examples
        everything, labels = _synthetic(made, source.model, one, training.seed, progress), False
    else:
        everything = open_examples(data, source, shape, length)
    tested = open_examples(test, source, shape, length) if test else None
    taught_by = _teacher(teacher) if teacher else source.model
    trained_on: Examples = everything
    chosen: Examples | None = None
    if labels or held_out or training.patience:
        trained_on, chosen = split(everything, held_out or max(1, min(5000, len(everything) // 10)), training.seed)
    if not labels:
        losses, chosen = replace(losses, task=0.0), decided(chosen, taught_by)
    work = target.with_name(f"{target.name}.training")
    trained = fine_tune(
        student,
        trained_on,
        teacher=taught_by,
        plan=plan,
        original=source.model,
        training=training,
        losses=losses,
        held_out=chosen,
        checkpoint=work / "checkpoint.safetensors",
        resume=resume,
        log=work / "log.csv",
        progress=progress,
    )
    dense = opened_for(source.model, plan)
    measured = tuple(_measured(layer, dense, trained.model, plan) for layer in plan.layers)
    place = processes().device
    models = tuple(model.to(place) for model in (source.model, student, trained.model))
    this = {
        "training": {**asdict(training), "precision": trained.precision},
        "losses": {name: value for name, value in asdict(losses).items() if name != "criterion"},
        "data": data,
        "examples": len(trained_on),
        **({"teacher": teacher[0], "teacher_sha256": digest(Path(teacher[1]))} if teacher else {"teacher": "original"}),
    }
    settings = {
        **plan.settings,
        "fine_tunings": [*plan.settings.get("fine_tunings", []), this],
        "metric": "frobenius, after fine-tuning",
    }
    plan = replace(plan, settings=settings, layers=measured)
    held, final = (
        tuple(score_of(model, part, progress=progress, what=f"scoring on {what}") for model in models)
        if part is not None and trained.main
        else ()
        for part, what in ((chosen, "held-out data"), (tested, "test data"))
    )
    times = _latencies(source, shape, models) if trained.main else (0.0,) * len(models)
    found = FineTuning(
        plan,
        held,
        final,
        times,
        trained.epochs,
        trained.precision,
        time.perf_counter() - start,
        target,
        trained.main,
        "perplexity" if isinstance(everything, TextData) else "top1" if labels else "agreement",
    )
    if trained.main:
        result = Result(trained.model, plan, found.seconds)
        origin = {name: value for name, value in plan.source.items() if name != "files"}
        save(result, target, source=origin, metrics={"fine_tuning": found.as_dict()})
    return found


def open_examples(spec: str, source: Source, shape: tuple[int, ...] | None, length: int) -> Examples:
    """The labelled inputs that a specification names, or the blocks of a text, for a network."""
    if is_text(spec):
        return TextData(open_text(spec, source.tokenize, length).rows)
    one = one_input(shape, spec)
    return open_dataset(spec, one, source.normalised_by(one[0]))


def synthetic_count(data: str) -> int | None:
    """How many inputs "synthetic:COUNT" asks for, None of other data; raises DataError where that is no number."""
    if not data.startswith(SYNTHETIC):
        return None
    count = data.removeprefix(SYNTHETIC)
    if not count.isdecimal() or int(count) < 1:
        raise DataError(f"data {data!r}: say how many inputs are to be made, for example synthetic:4096")
    return int(count)


def _synthetic(count: int, model: nn.Module, shape: tuple[int, ...], seed: int, progress: Progress) -> Dataset:
    """So many inputs made from the network; the labels are all zero and mean nothing."""
    x = torch.cat(synthetic_inputs(model, shape, count, seed=seed, progress=progress)).float().numpy()
    return Dataset(x, np.zeros(len(x), np.int64), shape, Normalisation((0.0,), (1.0,), "none"))


def _teacher(given: tuple[str, str | Path]) -> nn.Module:
    """Another network, by MODEL and weights."""
    spec, path = given
    model = build_model(spec).model
    load_weights_(model, path)
    return model


def _measured(layer: LayerPlan, original: nn.Module, student: nn.Module, plan: Plan) -> LayerPlan:
    """The plan's entry with the relative squared Frobenius error of the factors as they are now."""
    if layer.narrowed:
        return replace(layer, error=narrowed_error(original, student, plan, layer, IDENTITY))
    if layer.decomposition is None:
        return layer
    module = original.get_submodule(layer.name)
    wiring = wiring_of(layer.decomposition, shape_of(module))
    factors = stage_factors(student.get_submodule(layer.name), module, wiring, layer.ranks)
    exact = tuple(factor.detach().double() for factor in factors)
    return replace(layer, error=relative_error(weight_of(module).double(), wiring, exact))


def _latencies(source: Source, shape: tuple[int, ...] | None, models: Sequence[nn.Module]) -> tuple[float, ...]:
    dtype = next(p.dtype for p in models[-1].parameters() if p.is_floating_point())
    source.model.to(dtype)
    return latency(models, source.example_inputs() if shape is None else source.example(shape))
