"""RENE made exact and budgeted: one distribution over every layer's candidates, cooled until each layer has one.

After Aghababaei-Harandi and Amini, arXiv 2409.03555. What is kept: logits and a softmax per layer, steps that alternate
between weights and ranks, refinement in stages. What is different, and why:

- The rank loss gives way to the cost itself, under multipliers that make the budget hold (`relaxation`).
- The weight step is exact: closed-form factors, or least squares where there is no closed form.
- A separable objective is the expected error Σ p e, not the error of the blended weight. With nested factors the blend
  is a mask c_j = Σ_{r ≥ j} p^(r) on the components, its error Σ_j σ_j² (1 − c_j)² is lower than that of the rank of the
  same cost, and its minimum is a blend (soft thresholding): nothing drives the published softmax to one rank. The
  expected error has its minima at single ranks.
- An objective that goes through the network starts from that plan and descends: the derivative of the loss by every
  candidate's probability, all layers compressed as they now are, plus a proximal term on how far weights move, are the
  prices of the next distribution. Its plan is tried on the network and taken only where the loss falls. Candidates are
  few and lie around the present ones, first far apart, then closer: the published refinement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rankfold.errors import BudgetError
from rankfold.progress import Progress, silent
from rankfold.search import checkpoint as files
from rankfold.search.curves import Curve, Fit, refitted
from rankfold.search.descent import Point, descended
from rankfold.search.objective import Objective, Reconstruction
from rankfold.search.problem import ERROR, Problem, Selection, check_feasible
from rankfold.search.relaxation import Relaxed, cooled, entropy
from rankfold.search.rounding import rounded
from rankfold.search.settle import GUESSES, grounded, known, unsettled, visited
from rankfold.search.trace import Step, Trace, step_from_dict

HOT, COLD = 0.1, 1e-4
"""First and last temperature, as shares of the mean range of prices within a layer."""
STAGES = 24
"""Stages after which the search has to do with the candidates that are fitted."""


@dataclass(frozen=True)
class Rene:
    """The search, for `compress(..., search=Rene(...))`.

    A stage of `iterations` goes from hot to cold; an objective that goes through the network is then descended on for
    at most `turns`. With a `checkpoint` the state is written there after every stage and turn; the same search started
    again goes on from it and ends with the same plan. The file is left in place.
    """

    objective: Objective = field(default_factory=Reconstruction)
    iterations: int = 16
    turns: int = 32
    checkpoint: Path | None = None

    def __repr__(self) -> str:
        return f"rene: {self.objective.describe()}, {self.iterations} iterations a stage, {self.turns} turns"

    def __call__(self, problem: Problem, progress: Progress = silent, /) -> Selection:
        """The plan found.

        Raises BudgetError where there is none within the limits, SearchError where the objective is not finite.
        """
        check_feasible(problem)
        if not self.objective.separable and ERROR in problem.limited:
            raise BudgetError("a limit on the error goes with the reconstruction objective; limit a cost instead")
        return _Run(self, problem, progress).finish() if problem.curves else Selection((), 0.0, trace=Trace((), ()))


class _Run:
    """The state of one search: the curves as far as they are fitted, where the descent is, the history."""

    def __init__(self, settings: Rene, problem: Problem, progress: Progress) -> None:
        self.settings, self.problem, self.progress = settings, problem, progress
        self.stage = 0
        self.point: Point | None = None
        self.steps: list[Step] = []
        self._digest = files.digest_of(problem, repr(settings)) if settings.checkpoint else ""
        self._restore()

    def finish(self) -> Selection:
        """Stages until every chosen candidate is fitted, and the descent where the objective needs one."""
        choices = self.point.choices if self.point else self._settled()
        if not self.settings.objective.separable:
            choices = self._descend(choices)
            self._fit(choices)
        problem = self.problem
        trace = Trace(tuple(curve.layer.name for curve in problem.curves), tuple(self.steps))
        return Selection(choices, problem.objective(choices), curves=problem.curves, trace=trace)

    def _settled(self) -> tuple[int, ...]:
        """The choices of the last stage, the first in which nothing new has to be fitted."""
        while True:
            choices = self._cool()
            self.stage += 1
            if not self._fit(choices):
                return choices
            self._narrow()
            self._save()

    def _narrow(self) -> None:
        """Gives up candidates that would keep the search from ending."""
        if self.stage >= STAGES:
            self.problem = known(self.problem)
        elif self.stage >= GUESSES:
            self.problem = grounded(self.problem)

    def _cool(self) -> tuple[int, ...]:
        """One stage: from a spread-out distribution to one candidate per layer."""
        problem, total = self.problem, self.settings.iterations
        prices = [problem.values(curve) for curve in problem.curves]
        for iteration in range(total):
            share = HOT * (COLD / HOT) ** (iteration / max(total - 1, 1))
            relaxed = cooled(problem, prices, share)
            expected = sum(float(p @ v) for p, v in zip(relaxed.distributions, prices, strict=True))
            self._record(problem, relaxed, {"expected": expected}, iteration)
        choices = rounded(problem, relaxed.reduced)
        if choices is None:
            raise BudgetError("search 'rene' finds no plan for these limits together; search 'exact' does")
        return choices

    def _descend(self, choices: tuple[int, ...]) -> tuple[int, ...]:
        """The choices once the objective itself no longer falls."""
        self.point = self.point or Point(choices)
        for turn in descended(self.problem, self.settings.objective, self.point, self.settings.turns):
            self.point = turn.point
            losses = {"objective": turn.loss}
            self._record(turn.window, turn.relaxed, losses, turn.point.turn - 1)
            self._save()
        return self.point.choices

    def _fit(self, choices: Sequence[int]) -> bool:
        """Fits what was chosen and has not been; whether there was anything."""
        problem = self.problem
        wanted = unsettled(problem, choices)
        self.problem = visited(problem, wanted, self.progress)
        return any(wanted)

    def _record(self, problem: Problem, relaxed: Relaxed, losses: dict[str, float], iteration: int) -> None:
        """A step over the candidates of `problem`."""
        pairs = list(zip(problem.curves, relaxed.distributions, strict=True))
        costs = {
            unit: float(getattr(problem.fixed, unit)) + sum(float(p @ curve.costs[unit]) for curve, p in pairs)
            for unit in (problem.curves[0].costs if problem.curves else ())
        }
        entropies = tuple(entropy(p) for p in relaxed.distributions)
        likeliest = tuple(_label(curve, int(p.argmax())) for curve, p in pairs)
        self.steps.append(Step(self.stage, iteration, relaxed.temperature, losses, costs, entropies, likeliest))
        unit = next(iter(problem.limits), "macs")
        kept = costs[unit] / max(getattr(problem.original, unit), 1)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        most = self.settings.turns if "objective" in losses else self.settings.iterations
        note = f"stage {self.stage + 1}: {shown}, {unit} {100 * kept:.1f} %"
        self.progress("searching ranks", iteration + 1, most, note)

    def _save(self) -> None:
        if self.settings.checkpoint is None:
            return
        state = {
            "stage": self.stage,
            "point": asdict(self.point) if self.point else None,
            "fits": [
                {name: [(f.ranks, f.params, f.ratio, f.full) for f in fitted] for name, fitted in part.fits.items()}
                for curve in self.problem.curves
                for part in curve.parts
            ],
            "steps": [asdict(step) for step in self.steps],
        }
        files.write(self.settings.checkpoint, self._digest, state)

    def _restore(self) -> None:
        state = files.read(self.settings.checkpoint, self._digest) if self.settings.checkpoint else None
        if state is None:
            return
        self.stage = int(state["stage"])
        point: dict[str, Any] = state["point"] or {}
        self.point = Point(**point | {"choices": tuple(point["choices"])}) if point else None
        self.steps = [step_from_dict(entry) for entry in state["steps"]]
        saved = iter(state["fits"])
        curves = [
            curve.of_parts([_with_fits(part, next(saved)) for part in curve.parts]) for curve in self.problem.curves
        ]
        self.problem = replace(self.problem, curves=tuple(curves))
        self._narrow()


def _with_fits(curve: Curve, fits: Mapping[str, Any]) -> Curve:
    """A curve with the fits of a checkpoint."""
    return refitted(curve, {name: [Fit(tuple(r), *rest) for r, *rest in known] for name, known in fits.items()})


def _label(curve: Curve, k: int) -> str:
    """A candidate in words, such as "tucker 12 14"."""
    return " ".join([curve.methods[k] or "dense", *map(str, curve.ranks[k])])
