"""RENE as published: Aghababaei-Harandi and Amini, arXiv 2409.03555, sections 4.1 to 4.3 and algorithm 1.

Each layer i has candidate ranks R_i, a factor set Ŵ_i^(r) and a logit α_i^(r) for each, and p_i = softmax(α_i). With
the rank loss L_r = γ Σ_i (Σ_r p_i^(r) r / max R_i)^β (equation 5), two steps alternate:

    weights  lower  [Σ_i ‖W_i − Σ_r p_i^(r) Ŵ_i^(r)‖²] · L_r   over the factors (equation 6); needs no data
    ranks    lower  L_val · L_r                                over the logits (equation 7)

by stochastic gradient descent with Nesterov momentum, weights alone at first. Then the candidates are replaced by
closer ones around each layer's likeliest, and everything starts anew, until the step between them was one.

There is no budget in it, and nothing that keeps a layer from growing. It is here to be compared with; `rene` is the
search to use. The paper's "TT" is the train over outputs, taps together, inputs, with tied ranks: `tucker` here. Its CP
is `cp3`.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from rankfold.budget import LATENCY, UNITS, describe
from rankfold.errors import BudgetError, SearchError
from rankfold.progress import Progress, silent
from rankfold.search import checkpoint as files
from rankfold.search.objective import Objective, Reconstruction
from rankfold.search.problem import Problem, Selection
from rankfold.search.published_layer import Layer, with_rank
from rankfold.search.trace import Step, Trace, step_from_dict


@dataclass(frozen=True)
class Schedule:
    """Candidate ranks: from `smallest` to `largest` by `step`, then around the winner r by steps `factor` times finer.

    A refinement spans r − s/2 … r + s/2, where s is the step so far, by ⌊s/factor⌋; the search ends when that is zero.
    """

    smallest: int
    largest: int
    step: int
    factor: int

    def first(self) -> tuple[int, ...]:
        """The candidates of the first stage."""
        return tuple(range(self.smallest, self.largest + 1, self.step))

    def step_after(self, stage: int) -> int:
        """The step of a stage, counted from 0; zero where the search is over."""
        return int(self.step // self.factor**stage)

    def refined(self, best: int, stage: int) -> tuple[int, ...]:
        """The candidates of a stage from 1 on, around the winner of the one before."""
        half, step = self.step_after(stage - 1) // 2, self.step_after(stage)
        return tuple(range(max(1, best - half), best + half + 1, step))


CIFAR = Schedule(10, 100, 10, 10)
"""The paper's schedule for networks on CIFAR; its learning rate is 1e-3."""
IMAGENET = Schedule(50, 850, 100, 10)
"""The paper's schedule for networks on ImageNet; its learning rate is 1e-4."""


@dataclass(frozen=True)
class Published:
    """The search, for `compress(..., search=Published(...))`; every layer needs one decomposition given, not several.

    `objective` is what the rank step lowers. `warmup` weight steps come first, then `iterations` of both. `clip` bounds
    the norm of either gradient (None, as published: not at all). `seed` draws the logits' start, normal of deviation
    `spread`. For ablations: `alternate=False` takes both steps from one point, and `nested` lets all candidates of a
    layer share one factor set, of which they use leading parts.
    """

    schedule: Schedule = CIFAR
    gamma: float = 0.4
    beta: float = 0.8
    rate: float = 1e-3
    momentum: float = 0.9
    warmup: int = 20
    iterations: int = 100
    objective: Objective = field(default_factory=lambda: Reconstruction(relative=False))
    clip: float | None = None
    alternate: bool = True
    nested: bool = False
    seed: int = 0
    spread: float = 1e-3
    checkpoint: Path | None = None
    every: int = 20

    def __repr__(self) -> str:
        kinds = ("alternating" if self.alternate else "simultaneous") + (", nested" if self.nested else "")
        s = self.schedule
        return (
            f"published rene: {self.objective.describe()}, {s.smallest}…{s.largest} by {s.step} over {s.factor}, "
            f"gamma {self.gamma:g}, beta {self.beta:g}, rate {self.rate:g}, momentum {self.momentum:g}, "
            f"{self.warmup} + {self.iterations} iterations, clip {self.clip}, {kinds}, seed {self.seed}, {self.spread}"
        )

    def __call__(self, problem: Problem, progress: Progress = silent, /) -> Selection:
        """The ranks found, layers that would grow kept dense.

        Raises SearchError where a loss or a logit is not finite, and BudgetError where the plan is over the budget,
        which the method knows nothing of, or limits what it does not count.
        """
        if LATENCY in problem.limits:
            raise BudgetError("the published search counts parameters, MACs and bytes; limit the latency with exact")
        run = _Run(self, problem, progress)
        run.search()
        return run.selection()


class _Run:
    """The state of one search."""

    def __init__(self, settings: Published, problem: Problem, progress: Progress) -> None:
        self.settings, self.problem, self.progress = settings, problem, progress
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.steps: list[Step] = []
        self.stage = self.iteration = 0
        self._digest = files.digest_of(problem, repr(settings)) if settings.checkpoint else ""
        state = files.read(settings.checkpoint, self._digest) if settings.checkpoint else None
        if state is None:
            self._begin([settings.schedule.first()] * len(problem.curves))
        else:
            self._restore(state)

    def search(self) -> None:
        """All stages."""
        while True:
            total = self.settings.warmup + self.settings.iterations
            while self.iteration < total:
                self._iterate()
                self.iteration += 1
                if self.iteration % self.settings.every == 0:
                    self._save()
            if not self.settings.schedule.step_after(self.stage + 1):
                return
            best = [layer.ranks[int(layer.logits.argmax())] for layer in self.layers]
            self.stage, self.iteration = self.stage + 1, 0
            self._begin([self.settings.schedule.refined(rank, self.stage) for rank in best])

    def selection(self) -> Selection:
        """The plan of each layer's likeliest rank."""
        curves = tuple(with_rank(layer) for layer in self.layers)
        problem = replace(self.problem, curves=curves)
        units = list(self.problem.limits) or ["macs"]
        choices = tuple(int(all(curve.costs[unit][1] < curve.costs[unit][0] for unit in units)) for curve in curves)
        if not problem.fits(choices):
            used = {u: int(problem.used(choices, u)) + int(getattr(problem.fixed, u)) for u in problem.limits}
            raise BudgetError(
                f"the published search knows no budget; it found a plan of {describe(used, problem.original)}, or of "
                "too large an error; loosen the budget, change gamma and beta, or use search='rene'"
            )
        trace = Trace(tuple(layer.curve.layer.name for layer in self.layers), tuple(self.steps))
        return Selection(choices, problem.objective(choices), curves=curves, trace=trace)

    def _begin(self, ranks: Sequence[Sequence[int]]) -> None:
        """Fresh factors and logits for new candidates."""
        self.layers = []
        for done, (curve, own) in enumerate(zip(self.problem.curves, ranks, strict=True)):
            self.progress("fitting candidates", done, len(ranks))
            self.layers.append(Layer(curve, own, self.settings.nested))
        self.progress("fitting candidates", len(ranks), len(ranks))
        for layer in self.layers:
            layer.logits = self.settings.spread * torch.randn(len(layer.ranks), generator=self.generator)
        self._optimise()

    def _optimise(self) -> None:
        """Optimisers over the present factors and logits."""
        tensors = [factor for layer in self.layers for one in layer.factors for factor in one]
        logits = [layer.logits for layer in self.layers]
        for tensor in (*tensors, *logits):
            tensor.requires_grad_()
        options = {"lr": self.settings.rate, "momentum": self.settings.momentum, "nesterov": True}
        self.weight_step = torch.optim.SGD(tensors, **options)
        self.rank_step = torch.optim.SGD(logits, **options)

    def _iterate(self) -> None:
        """One weight step and, after the warm-up, one rank step."""
        joint = self.iteration >= self.settings.warmup
        losses = {}
        if joint and not self.settings.alternate:
            losses["weights"] = self._weight_gradient()
            losses["ranks"] = self._rank_gradient()
            self.weight_step.step()
            self.rank_step.step()
        else:
            losses["weights"] = self._weight_gradient()
            self.weight_step.step()
            if joint:
                losses["ranks"] = self._rank_gradient()
                self.rank_step.step()
        self._check(losses)
        self._record(losses)

    def _weight_gradient(self) -> float:
        """Equation 6 and its gradient by the factors."""
        self.weight_step.zero_grad()
        with torch.no_grad():
            shares = [layer.logits.softmax(0) for layer in self.layers]
            scale = self._rank_loss(shares)
        total = torch.zeros(())
        for layer, share in zip(self.layers, shares, strict=True):
            mixed = torch.stack([p * weight for p, weight in zip(share, layer.candidates(), strict=True)]).sum(0)
            total = total + (layer.target - mixed).square().sum()
        loss = total * scale
        loss.backward()
        self._clip(self.weight_step)
        return float(loss.detach())

    def _rank_gradient(self) -> float:
        """Equation 7 and its gradient by the logits."""
        self.rank_step.zero_grad()
        with torch.no_grad():
            candidates = [torch.stack(layer.candidates()) for layer in self.layers]
        shares = [layer.logits.softmax(0) for layer in self.layers]
        mixed = [torch.tensordot(p, weights, 1) for p, weights in zip(shares, candidates, strict=True)]
        curves = [layer.curve for layer in self.layers]
        value, slopes = self.settings.objective.gradient(curves, [one.detach() for one in mixed], self.iteration)
        rank_loss = self._rank_loss(shares)
        along = torch.stack([(slope.float() * one).sum() for slope, one in zip(slopes, mixed, strict=True)]).sum()
        (rank_loss.detach() * along + value * rank_loss).backward()
        self._clip(self.rank_step)
        return value * float(rank_loss.detach())

    def _rank_loss(self, shares: Sequence[Tensor]) -> Tensor:
        """Equation 5."""
        means = torch.stack([(p * layer.relative_ranks).sum() for p, layer in zip(shares, self.layers, strict=True)])
        return self.settings.gamma * means.pow(self.settings.beta).sum()

    def _clip(self, optimiser: torch.optim.Optimizer) -> None:
        """Bounds the norm of the gradient, where the settings do."""
        if self.settings.clip is not None:
            parameters = [tensor for group in optimiser.param_groups for tensor in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)

    def _check(self, losses: dict[str, float]) -> None:
        """Raises SearchError where anything is not finite; a softmax of NaN would pass for the smallest rank."""
        advice = "lower the learning rate, or clip the gradients (clip=5)"
        for layer in self.layers:
            sound = [layer.logits, *(factor for one in layer.factors for factor in one)]
            if not all(bool(torch.isfinite(tensor).all()) for tensor in sound):
                kind = "logits" if not torch.isfinite(layer.logits).all() else "factors"
                raise SearchError(
                    f"{layer.curve.layer.name}: {kind} are not finite in stage {self.stage + 1}, iteration "
                    f"{self.iteration + 1} of the published search; {advice}"
                )
        bad = [name for name, value in losses.items() if not np.isfinite(value)]
        if bad:
            raise SearchError(
                f"the loss of the {bad[0]} is not finite in stage {self.stage + 1}, iteration {self.iteration + 1} of "
                f"the published search; {advice}, or check the objective's inputs"
            )

    def _record(self, losses: dict[str, float]) -> None:
        """Adds the iteration to the trace, and reports it."""
        shares = [layer.logits.detach().softmax(0) for layer in self.layers]
        fixed, original = self.problem.fixed, self.problem.original
        pairs = list(zip(shares, self.layers, strict=True))
        costs = {unit: getattr(fixed, unit) + sum(float(p @ layer.costs(unit)) for p, layer in pairs) for unit in UNITS}
        entropy = tuple(float(-(p * p.clamp_min(1e-30).log()).sum()) for p in shares)
        likeliest = tuple(
            f"{layer.method} " + " ".join(map(str, layer.tied(layer.ranks[int(p.argmax())]))) for p, layer in pairs
        )
        self.steps.append(Step(self.stage, self.iteration, 1.0, losses, costs, entropy, likeliest))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        note = f"stage {self.stage + 1}: {shown}, macs {100 * costs['macs'] / max(original.macs, 1):.1f} %"
        total = self.settings.warmup + self.settings.iterations
        self.progress("searching ranks", self.iteration + 1, total, note)

    def _save(self) -> None:
        """Writes the checkpoint, where one is kept."""
        if self.settings.checkpoint is None:
            return
        state = {
            "stage": self.stage,
            "iteration": self.iteration,
            "ranks": [layer.ranks for layer in self.layers],
            "steps": [vars(step) for step in self.steps],
            "tensors": base64.b64encode(safetensors.torch.save(self._tensors())).decode(),
        }
        files.write(self.settings.checkpoint, self._digest, state)

    def _restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self._begin(state["ranks"])
        self.stage, self.iteration = state["stage"], state["iteration"]
        self.steps = [step_from_dict(entry) for entry in state["steps"]]
        saved = safetensors.torch.load(base64.b64decode(state["tensors"]))
        self.generator.set_state(saved.pop("generator"))
        for name, tensor in self._tensors().items():
            if name in saved and name != "generator":
                tensor.copy_(saved[name])
        for key, (optimiser, parameter) in self._moving().items():
            if key in saved:
                optimiser.state[parameter]["momentum_buffer"] = saved[key]

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that changes from step to step, by name."""
        tensors = {"generator": self.generator.get_state()}
        for key, (optimiser, parameter) in self._moving().items():
            tensors[key.removeprefix("momentum ")] = parameter.detach()
            momentum = optimiser.state[parameter].get("momentum_buffer") if parameter in optimiser.state else None
            if momentum is not None:
                tensors[key] = momentum
        return tensors

    def _moving(self) -> dict[str, tuple[torch.optim.Optimizer, Tensor]]:
        """What the optimisers move, by the name of its momentum."""
        return {
            f"momentum {kind} {number}": (optimiser, parameter)
            for kind, optimiser in (("factor", self.weight_step), ("logits", self.rank_step))
            for number, parameter in enumerate(optimiser.param_groups[0]["params"])
        }
