"""What brings accuracy back after surgery, without a label: fits in forward order, descent by blocks, distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor, nn

from rankfold.calibration.forward_order import refit_, with_errors
from rankfold.calibration.moments import Calibration
from rankfold.calibration.refining import Refining, refine_
from rankfold.calibration.store import TensorFiles
from rankfold.errors import DataError, ModelError
from rankfold.memory import trim
from rankfold.network.costs import storage_key
from rankfold.network.passes import Inputs, examples_in
from rankfold.plan import Plan
from rankfold.progress import Progress, silent
from rankfold.search.network_objectives import divergences
from rankfold.search.prices import TEMPERATURE
from rankfold.training import Losses, Training, Unlabelled, fine_tune
from rankfold.training.augment import is_images, with_copies
from rankfold.training.preparation import processes
from rankfold.training.settings import distilling

FEWEST = 32
"""Calibration inputs from which on it is judged whether fits in forward order help: of fewer, too few are held back to
tell. A network that lost channels then does without such fits, as they can do it harm; others have them."""
APART = "layer by layer: in forward order there are too few inputs, or it was farther from the original"
"""What a plan says of fits in forward order that were taken back."""
SURE = 1.3
"""Standard errors by which divergence has to grow to count: one time in ten it does by chance."""
FARTHER = "blocks came closer, but the network was farther from the original on inputs held back"
"""What a plan says of refined blocks that were taken back."""


@dataclass(frozen=True)
class Recovery:
    """What is done to a compressed network on the inputs that it was calibrated on.

    `in_order`: every layer is fitted once more to the original's outputs, from what the compressed ones before it give.
    `refining`: blocks are trained one after another towards what the original's give. `distilling`: the whole network
    is trained towards what the original gives, in so many epochs, or by settings of fine-tuning.
    """

    in_order: bool = True
    refining: Refining = field(default_factory=lambda: Refining(0))
    distilling: int | Training = 0

    def check(self, known: Calibration) -> None:
        """Raises DataError where training is asked for, and there is nothing to train on."""
        if (self.refining.epochs or self.distilling) and not known.inputs:
            raise DataError(
                f"refining and distilling need calibration inputs that can be read again, and there are none "
                f"({known.source}: {known.reason}); give some, or calibration='synthetic'"
            )

    def apply(
        self, student: nn.Module, model: nn.Module, plan: Plan, known: Calibration, progress: Progress = silent
    ) -> tuple[nn.Module, Plan]:
        """The network that becomes of a student, which `plan` made from `model`, and the plan with what was done."""
        student, plan, before = self._ordered(student, model, plan, known, progress)
        student, plan = self._refined(student, model, plan, known, before, progress)
        return self._distilled(student, model, plan, known, progress)

    def _ordered(
        self, student: nn.Module, model: nn.Module, plan: Plan, known: Calibration, progress: Progress
    ) -> tuple[nn.Module, Plan, Attempt | None]:
        """A student fitted in forward order, with how it was, or as it was where that is not asked for or no help."""
        if not self.in_order:
            return student, plan, None
        apart = replace(plan, settings={**plan.settings, "fitted": APART})
        few = known.samples + sum(map(examples_in, known.held)) < FEWEST
        if plan.narrowings and few:
            return student, apart, None
        judged = [] if few else known.held or list(known.inputs)
        attempt = Attempt(student, model, judged)
        plan = refit_(
            student,
            model,
            plan,
            known.inputs,
            moments=known.moments,
            weights=known.weights,
            outputs=known.outputs,
            progress=progress,
        )
        return (student, apart, None) if attempt.taken_back() else (student, plan, attempt)

    def _refined(
        self,
        student: nn.Module,
        model: nn.Module,
        plan: Plan,
        known: Calibration,
        before: Attempt | None,
        progress: Progress,
    ) -> tuple[nn.Module, Plan]:
        """A student whose blocks were refined, with what became of them, or as it was where that did harm.

        A block begins as it was `before` fits in forward order where it is closer so: they make up for what is lost in
        front of it, which is less by then.
        """
        if not self.refining.epochs:
            return student, plan
        attempt = Attempt(student, model, known.held)
        inputs = with_copies(known.inputs, self.refining.copies)
        begun = None if before is None else before.chosen_
        found = refine_(
            student, model, plan, inputs, known.held, refining=self.refining, begun=begun, progress=progress
        )
        blocks = {one.name: [one.before, one.after] for one in found}
        told = {**plan.settings, **self.refining.as_dict(), "refined_blocks": blocks}
        if found and attempt.taken_back():
            return student, replace(plan, settings={**told, "refined_blocks": {}, "not_refined": FARTHER})
        return student, replace(_measured_again(student, model, plan, known), settings=told)

    def _distilled(
        self, student: nn.Module, model: nn.Module, plan: Plan, known: Calibration, progress: Progress
    ) -> tuple[nn.Module, Plan]:
        """A student that learned from the original's outputs, or as it was where they came no closer on held inputs."""
        if not self.distilling:
            return student, plan
        here = processes()
        training = distilling(self.distilling, known.inputs, here.device)
        inputs, batch_size = Unlabelled.of(known.inputs, training.batch_size)
        held, _ = Unlabelled.of(known.held, training.batch_size)
        training = replace(training, batch_size=math.ceil(batch_size / here.num_processes) * here.num_processes)
        trained = fine_tune(
            student,
            inputs,
            teacher=model,
            plan=plan,
            training=training,
            losses=learned(known.inputs),
            held_out=held if len(held) else None,
            progress=lambda what, *rest: progress(what.replace("fine-tuning", "distilling"), *rest),  # pyrefly: ignore[bad-argument-type]
        )
        reached = [one.divergence for one in trained.epochs if one.divergence is not None]
        told = {**asdict(training), "precision": trained.precision, "divergence": [trained.started, *reached]}
        plan = _measured_again(trained.model, model, plan, known)
        return trained.model, replace(plan, settings={**plan.settings, "distilled": told})


class Attempt:
    """A student before something is done to it, and how far its outputs are from the original's on some inputs.

    Its tensors are kept in files, so that it can be as it was; without inputs, or where outputs cannot be compared,
    nothing is kept, and nothing taken back.
    """

    def __init__(self, student: nn.Module, model: nn.Module, batches: Sequence[Inputs]) -> None:
        self._student, self._model, self._batches = student, model, batches
        self._had = self._distances()
        self._files = TensorFiles("weights")
        tensors = () if self._had is None else student.state_dict().values()
        self._tensors = list({storage_key(one): one for one in tensors if one.is_floating_point()}.values())
        for number, tensor in enumerate(self._tensors):
            self._files.write(str(number), {"": tensor})

    def taken_back(self) -> bool:
        """Whether the outputs are farther from the original's by now, and the student is therefore as it was."""
        if self._had is None or (has := self._distances()) is None or not is_farther(self._had, has):
            return False
        self._put_back_(range(len(self._tensors)))
        return True

    def chosen_(self, tensors: Sequence[Tensor], error: Callable[[], float]) -> None:
        """Makes some of the student's tensors what they were where an error is lower so."""
        own = {storage_key(one) for one in tensors}
        places = [place for place, one in enumerate(self._tensors) if storage_key(one) in own]
        if not places:
            return
        kept, reached = [self._tensors[place].clone() for place in places], error()
        self._put_back_(places)
        if not error() < reached:
            for place, value in zip(places, kept, strict=True):
                self._tensors[place].copy_(value)

    def _put_back_(self, places: Iterable[int]) -> None:
        """Makes the tensors at some places what they were."""
        for place in places:
            self._tensors[place].copy_(self._files.read(str(place))[""])

    def _distances(self) -> Tensor | None:
        if not self._batches:
            return None
        found = None
        trim()
        with suppress(ModelError):
            found = divergences(self._model, self._student, self._batches, TEMPERATURE)
        trim()
        return found


def is_farther(had: Tensor, has: Tensor) -> bool:
    """Whether a student's outputs are farther from the original's than they were, by divergences row by row.

    They tell what agreement of the likeliest classes does not: on 62 images, DeiT-Tiny at 70 % with 8.6 points of top-1
    lost, a difference of 1.2 standard errors in agreement, of 8.4 in divergence. Farther is what has grown by more than
    `SURE` standard errors.
    """
    gained = had - has
    return float(gained.mean()) < -SURE * float(gained.std(correction=0)) / len(gained) ** 0.5


def learned(batches: Iterable[Inputs]) -> Losses:
    """What a distilled network learns: of images what the original's blocks give, of anything else its outputs.

    A language model says something at every token; of images, outputs alone are too little to learn from.
    """
    if is_images(next(iter(batches))):
        return Losses(task=0.0, logits=0.0, blocks=1.0)
    return Losses(task=0.0, temperature=1.0)


def _measured_again(student: nn.Module, model: nn.Module, plan: Plan, known: Calibration) -> Plan:
    """The plan with the errors of the layers as they are now."""
    return with_errors(student, model, plan, {layer.name for layer in plan.changed}, known.moments)
