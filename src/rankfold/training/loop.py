"""Fine-tuning: one loop for every loss, device, precision and number of processes, by way of Hugging Face Accelerate.

The same call runs in one process or in several (`torchrun`, `accelerate launch`): every process takes its share of each
batch, gradients are averaged, and batch norms use the statistics of the whole batch, so the result is the same up to
the order of summation. Whatever is random is drawn from the seed, the epoch and the step, so a run that is interrupted
and resumed from its checkpoint ends with the same weights as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.calibration.positions import EXAMPLES
from rankfold.errors import TrainingError
from rankfold.network.copies import duplicate
from rankfold.network.passes import Inputs, mapped
from rankfold.plan import Plan
from rankfold.progress import Progress, silent
from rankfold.sources.data import Dataset
from rankfold.sources.text import TextData
from rankfold.training import checkpoints
from rankfold.training.augment import augmentation, boxes_of_others
from rankfold.training.checkpoints import Checkpoint
from rankfold.training.distillation import Distillation, Losses
from rankfold.training.examples import Examples, score_of
from rankfold.training.history import Epoch, Progressed, Trained
from rankfold.training.log import Log
from rankfold.training.preparation import accelerator, faster, geometry_of, optimiser, placed, processes, read_only
from rankfold.training.settings import Training, rate_at, seed_at
from rankfold.training.stopping import Stopping
from rankfold.training.synchronised import synchronise_norms_


def fine_tune(
    student: nn.Module,
    data: Examples,
    *,
    teacher: nn.Module | None = None,
    plan: Plan | None = None,
    original: nn.Module | None = None,
    training: Training | None = None,
    losses: Losses | None = None,
    held_out: Examples | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    log: Path | None = None,
    progress: Progress = silent,
) -> Trained:
    """A fine-tuned copy of `student`, taught by `teacher` on the inputs and labels of `data`.

    `plan` says how `student` was made from `original`, which is the teacher where no other network is given: CP layers
    are then damped before the first step, and SGD steps along the gradients of the weights that the factors stand for,
    see `rankfold.training.geometry`. Losses by layer need the plan too, and compare with the teacher. `held_out` is
    scored after every epoch, in the main process, and with a patience before the first. `checkpoint` is the file that
    the state is kept in; with `resume` an earlier run with the same settings goes on from there. `log` is a CSV file
    with a line per step. Raises TrainingError for settings that do not fit, and for a loss that is not finite, with the
    last checkpoint kept.
    """
    training, losses = training or Training(), losses or Losses()
    if training.patience and held_out is None:
        raise TrainingError("patience needs examples that are held out to score on; give some, or set it to zero")
    if resume and checkpoint is None:
        raise TrainingError("there is nothing to resume from without a checkpoint; say where it is")
    found = checkpoints.read(checkpoint) if resume and checkpoint else None
    precision = found.facts.get("precision", "no") if found else training.precision
    with torch.random.fork_rng():
        run = _Run(
            student,
            data,
            teacher,
            plan,
            original if original is not None else teacher,
            training=training,
            losses=losses,
            precision=precision,
            fresh=found is None,
        )
        if found:
            run.restore(found)
        began = run.state.step
        with Log(log if run.main else None, began) as lines:
            run.train(held_out, checkpoint if run.main else None, lines, progress)
    return Trained(run.result(), tuple(run.state.epochs), run.precision, began, run.main, run.state.started)


class _Run:
    """One training run: the networks where they are trained, the optimiser, and how far it is."""

    def __init__(
        self,
        student: nn.Module,
        data: Examples,
        teacher: nn.Module | None,
        plan: Plan | None,
        original: nn.Module | None,
        *,
        training: Training,
        losses: Losses,
        precision: str,
        fresh: bool,
    ) -> None:
        self.training, self.data, self.skeleton = training, data, student
        place = processes()
        self.device, self.rank, self.world = place.device, place.process_index, place.num_processes
        if training.batch_size % self.world or len(data) < training.batch_size:
            raise TrainingError(
                f"batches of {training.batch_size} do not divide among {self.world} processes, or exceed the "
                f"{len(data)} examples; change the batch size"
            )
        if training.changes_images and len(data.input_shape) != 3:
            raise TrainingError(
                f"augment {training.augment!r} and cutmix {training.cutmix} are for images, and these are none; leave "
                "them out"
            )
        if training.cutmix and losses.task:
            raise TrainingError("cutmix is for training without labels; leave it out, or set the task's loss to zero")
        self.layout = torch.channels_last if training.channels_last and len(data.input_shape) == 3 else None
        self.dtype = next(p.dtype for p in student.parameters() if p.is_floating_point())
        where = (self.device, self.dtype, self.layout)
        self.student = placed(student, *where).train(not training.as_evaluated)
        self.teacher = read_only(teacher, *where) if teacher else None
        self.geometry = geometry_of(self.student, original, plan, training)
        if self.geometry and fresh:
            self.geometry.damp_(training.damping)
        if self.world > 1:
            synchronise_norms_(self.student)
        seen = self._first(EXAMPLES) if losses.blocks else ()
        self.distillation = Distillation(losses, self.student, self.teacher, plan, seen)
        self.augment, self.black = augmentation(training.augment), data.black
        self.steps = len(data) // training.batch_size
        self.state, self.stopping = Progressed(), Stopping(training.patience, not isinstance(data, Dataset))
        if precision == "auto":
            precision = faster(self.student, self.distillation, *self._batch(torch.arange(training.batch_size)))
        self.precision, self.accelerator = precision, accelerator(precision)
        wrapped, self.optimiser = self.accelerator.prepare(self.student, optimiser(self.student, training))
        self.call = torch.compile(wrapped) if training.compiled else wrapped
        self.average = {name: tensor.clone() for name, tensor in self._floats()} if training.ema else {}

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def train(self, held_out: Examples | None, checkpoint: Path | None, log: Log, progress: Progress) -> None:
        """All steps that are left."""
        total, saved = self.steps * self.training.epochs, time.monotonic()
        ordered, order = -1, torch.empty(0)
        if self.training.patience and not self.state.step:
            self.state.started = self._scored(held_out)
        while self.state.step < total and (self.state.step % self.steps or not self._over()):
            start = time.perf_counter()
            epoch, place = divmod(self.state.step, self.steps)
            if ordered != epoch:
                ordered, order = epoch, self._drawn(epoch)
            rate = rate_at(self.training, self.state.step, total)
            terms = self._step(order[place * self.training.batch_size :][: self.training.batch_size], rate)
            done = place + 1 == self.steps
            saving = checkpoint is not None and (done or time.monotonic() - saved > 60 * self.training.minutes)
            self._check(terms, rate, checkpoint, saving)
            loss, taken = sum(terms.values()), time.perf_counter() - start
            self.state.step += 1
            self.state.loss_sum += loss
            self.state.seconds += taken
            speed = self.training.batch_size / taken
            log.line(self.state.step, epoch + 1, rate, speed, {"loss": loss, **terms})
            note = f"epoch {epoch + 1}, loss {loss:.4g}, rate {rate:.2g}, {speed:,.3g} examples/s"
            progress("fine-tuning", self.state.step, total, note)
            if done:
                self._close_epoch(held_out)
            if checkpoint is not None and saving:
                self._save(checkpoint)
                saved = time.monotonic()

    def result(self) -> nn.Module:
        """The network with the best weights that were kept, or those that it has now, in evaluation mode."""
        return self._made(self.stopping.weights or self._weights())

    def _made(self, weights: Mapping[str, Tensor]) -> nn.Module:
        model = duplicate(self.skeleton)
        model.load_state_dict(weights)
        return model.eval()

    def _weights(self) -> dict[str, Tensor]:
        """The weights as they are, or their average where one is kept."""
        return {**self.student.state_dict(), **self.average}

    def _over(self) -> bool:
        """Whether a process says that no better epoch is hoped for; only the main one keeps scores."""
        if not self.training.patience:
            return False
        over = torch.tensor(float(self.stopping.over), device=self.device)
        return bool(cast(Tensor, self.accelerator.reduce(over, "sum")) > 0)

    def restore(self, found: Checkpoint) -> None:
        """Goes on from a checkpoint; raises TrainingError where it is of another run."""
        if found.facts.get("settings") != self._settings():
            raise TrainingError("the checkpoint is of a run with other settings; resume with the same, or start anew")
        shapes = {name: tensor.shape for name, tensor in self.student.state_dict().items()}
        if {name: tensor.shape for name, tensor in found.groups["model"].items()} != shapes:
            raise TrainingError("the checkpoint is of another network; resume with the one it is of, or start anew")
        self.student.load_state_dict(found.groups["model"])
        self.average = {name: tensor.to(self.device) for name, tensor in found.groups.get("average", {}).items()}
        states: dict[int, dict[str, Tensor]] = {}
        for key, tensor in found.groups.get("optimiser", {}).items():
            index, _, name = key.partition(".")
            states.setdefault(int(index), {})[name] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": states})
        epochs = [Epoch(**one) for one in found.facts["epochs"]]
        told = {name: found.facts[name] for name in ("step", "loss_sum", "seconds", "started")}
        self.state = Progressed(epochs=epochs, **told)
        best = {name: tensor.to(self.device) for name, tensor in found.groups.get("best", {}).items()}
        self.stopping = replace(self.stopping, best=found.facts["best"], since=found.facts["since"], weights=best)

    def _drawn(self, epoch: int) -> Tensor:
        """The order of the examples in an epoch."""
        generator = torch.Generator().manual_seed(seed_at(self.training, 0, epoch))
        return torch.randperm(len(self.data), generator=generator)

    def _batch(self, chosen: Tensor) -> tuple[Inputs, Tensor]:
        """This process's share of a batch, augmented as the whole batch is."""
        x, y = self.data.take(chosen.tolist()).batch(0, len(chosen))
        if self.training.changes_images:
            generator = torch.Generator().manual_seed(seed_at(self.training, 1, self.state.step))
            x = boxes_of_others(self.augment(x, self.black, generator), self.training.cutmix, generator)
        return mapped(x, self._own), self._own(y)

    def _first(self, count: int) -> list[Inputs]:
        """The first examples of the data, at least so many where there are, in batches of a step's size."""
        size, most = self.training.batch_size, min(count, len(self.data))
        parts = (self.data.batch(start, start + size)[0] for start in range(0, most, size))
        return [mapped(one, self._moved) for one in parts]

    def _own(self, whole: Tensor) -> Tensor:
        """This process's share of a tensor, where it trains."""
        return self._moved(whole.chunk(self.world)[self.rank] if whole.ndim else whole)

    def _moved(self, part: Tensor) -> Tensor:
        """A tensor where this process trains, in the run's type and layout."""
        part = part.to(self.device, self.dtype if part.is_floating_point() else part.dtype)
        return part.contiguous(memory_format=self.layout) if self.layout is not None and part.ndim == 4 else part

    def _step(self, chosen: Tensor, rate: float) -> dict[str, float]:
        """One step of the optimiser; the terms of the loss as numbers, over all processes."""
        x, y = self._batch(chosen)
        torch.manual_seed(seed_at(self.training, 2 + self.rank, self.state.step))  # for dropout
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with self.accelerator.autocast():
            terms = self.distillation(self.call, x, y)
        self.optimiser.zero_grad()
        self.accelerator.backward(torch.stack(list(terms.values())).sum())
        self._shape_gradients_()
        self.optimiser.step()
        decay = min(self.training.ema, (1 + self.state.step) / (10 + self.state.step))
        for name, tensor in self._floats() if self.average else ():
            self.average[name].lerp_(tensor, 1 - decay)
        mean = self.accelerator.reduce(torch.stack([term.detach().float() for term in terms.values()]), "mean")
        return dict(zip(terms, cast(Tensor, mean).tolist(), strict=True))

    def _check(self, terms: Mapping[str, float], rate: float, checkpoint: Path | None, saving: bool) -> None:
        """Raises TrainingError where the loss, or a weight that is about to be saved, is not finite."""
        sound = math.isfinite(sum(terms.values()))
        if saving and sound:
            sound = all(bool(tensor.isfinite().all()) for _, tensor in self._floats())
        if not sound:
            raise TrainingError(_diverged(self.state.step, terms, rate, checkpoint))

    def _floats(self) -> list[tuple[str, Tensor]]:
        """Parameters and buffers that an average makes sense of."""
        return [(n, t.detach()) for n, t in self.student.state_dict().items() if t.is_floating_point()]

    def _shape_gradients_(self) -> None:
        """Scales the gradients of factors, and limits the norm of all."""
        clip = self.training.clip
        if self.geometry and self.training.steps_of_weights:
            energy, factors = self.geometry.scale_(), self.geometry.parameters
            if not clip:
                return
            gradients = {one: one.grad for one in self.student.parameters() if one.grad is not None}
            rest = (gradient.float().square().sum() for one, gradient in gradients.items() if one not in factors)
            norm = torch.stack([energy.float(), *rest]).sum().sqrt()
            for gradient in gradients.values():
                gradient.mul_(clip / norm.clamp_min(clip))
        elif clip:
            self.accelerator.clip_grad_norm_(self.student.parameters(), clip)

    def _close_epoch(self, held_out: Examples | None) -> None:
        """Adds the epoch that is over to the history, scored on what was held out."""
        state = self.state
        what = "perplexity" if isinstance(held_out, TextData) else "divergence"
        scores = {what if self.stopping.lower else "top1": self._scored(held_out)}
        state.epochs.append(
            Epoch(state.loss_sum / self.steps, seconds=round(state.seconds, 2), **{"top1": None, **scores})
        )
        state.loss_sum = state.seconds = 0.0

    def _scored(self, held_out: Examples | None) -> float | None:
        """The score of the weights as they are, which are kept where they are the best."""
        if held_out is None or not self.main:
            return None
        judged = self._made(self._weights()).to(self.device) if self.average else self.student
        score = score_of(judged, held_out, teacher=self.teacher)
        self.stopping.see(score, self._weights())
        return score

    def _save(self, path: Path) -> None:
        """Writes the checkpoint."""
        moments = {
            f"{index}.{name}": tensor
            for index, held in self.optimiser.state_dict()["state"].items()
            for name, tensor in held.items()
            if isinstance(tensor, Tensor)
        }
        groups = {
            "model": dict(self.student.state_dict()),
            "average": self.average,
            "optimiser": moments,
            "best": self.stopping.weights,
        }
        told = {"best": self.stopping.best, "since": self.stopping.since, "precision": self.precision}
        facts = {**asdict(self.state), **told, "settings": self._settings()}
        checkpoints.write(path, Checkpoint(groups, facts))

    def _settings(self) -> dict[str, Any]:
        """What has to be the same for a run to go on."""
        losses = {name: value for name, value in asdict(self.distillation.losses).items() if name != "criterion"}
        factors = [[*one.weights[0].shape] for one in self.geometry.layers] if self.geometry else []
        return {**asdict(self.training), "losses": losses, "examples": len(self.data), "factors": factors}


def _diverged(step: int, terms: Mapping[str, float], rate: float, checkpoint: Path | None) -> str:
    """What is said of a run that is not finite, and of what is left of it."""
    shown = ", ".join(f"{name} {value:g}" for name, value in terms.items())
    return (
        f"the loss or a weight is not finite at step {step + 1} ({shown}; learning rate {rate:.3g}); "
        f"{checkpoints.left(checkpoint)}; lower the learning rate, or the norm that gradients are clipped at"
    )
