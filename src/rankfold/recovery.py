"""What brings accuracy back after surgery, without a label: fits in forward order, descent by blocks, distillation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

from torch import nn

from rankfold.calibration.forward_order import refit_, with_errors
from rankfold.calibration.moments import Calibration
from rankfold.calibration.refining import Refining, refine_
from rankfold.errors import DataError
from rankfold.network.copies import duplicate
from rankfold.network.passes import Inputs, examples_in
from rankfold.plan import Plan
from rankfold.progress import Progress, silent
from rankfold.training import Losses, Training, Unlabelled, fine_tune
from rankfold.training.augment import is_images, with_copies
from rankfold.training.preparation import processes
from rankfold.training.settings import distilling
from rankfold.units import better

FEWEST = 32
"""Calibration inputs from which on it is judged whether fits in forward order help: of fewer, too few are held back to
tell. A network that lost channels then does without such fits, as they can do it harm; others have them."""
APART = "layer by layer: in forward order there are too few inputs, or it was farther from the original"
"""What a plan says of fits in forward order that were taken back."""

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
        student, plan = self._ordered(student, model, plan, known, progress)
        student, plan = self._refined(student, model, plan, known, progress)
        return self._distilled(student, model, plan, known, progress)

    def _ordered(
        self, student: nn.Module, model: nn.Module, plan: Plan, known: Calibration, progress: Progress
    ) -> tuple[nn.Module, Plan]:
        """A student fitted in forward order, or as it was where that is not asked for or does not help."""
        if not self.in_order:
            return student, plan
        apart = replace(plan, settings={**plan.settings, "fitted": APART})
        few = known.samples + sum(map(examples_in, known.held)) < FEWEST
        if plan.narrowings and few:
            return student, apart
        judged = [] if few else known.held or list(known.inputs)
        before = duplicate(student) if judged else None
        plan = refit_(
            student, model, plan, known.inputs, moments=known.moments, weights=known.weights, progress=progress
        )
        if before is None or better(model, before, student, judged):
            return student, plan
        return before, apart

    def _refined(
        self, student: nn.Module, model: nn.Module, plan: Plan, known: Calibration, progress: Progress
    ) -> tuple[nn.Module, Plan]:
        """A student whose blocks were refined, with what became of them, or as it was where that did harm."""
        if not self.refining.epochs:
            return student, plan
        before = duplicate(student)
        inputs = with_copies(known.inputs, self.refining.copies)
        found = refine_(student, model, plan, inputs, known.held, refining=self.refining, progress=progress)
        blocks = {one.name: [one.before, one.after] for one in found}
        told = {**plan.settings, **self.refining.as_dict(), "refined_blocks": blocks}
        if found and not better(model, before, student, known.held):
            return before, replace(plan, settings={**told, "refined_blocks": {}, "not_refined": FARTHER})
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
