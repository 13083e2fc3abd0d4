"""The whole flow, top to bottom: a network and a budget in, a smaller network and the plan that made it out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from rankfold.budget import LATENCY, Budget, Cost
from rankfold.calibration.asked import calibrated, provenance
from rankfold.calibration.moments import Calibration
from rankfold.calibration.pictured import pictures
from rankfold.calibration.refining import Refining
from rankfold.decompositions.metric import Moment
from rankfold.errors import BudgetError
from rankfold.memory import PLENTY, limited
from rankfold.network.checks import check_copies, check_model
from rankfold.network.copies import is_compiled, unwrapped
from rankfold.network.costs import cost_of
from rankfold.network.finding import Layers, find_layers
from rankfold.network.opening import Opened, opened
from rankfold.network.passes import Inputs
from rankfold.network.rehearsal import verified
from rankfold.network.surgery import apply_plan
from rankfold.network.timing.context import timing_of
from rankfold.plan import KNOWN_PLAN, Plan
from rankfold.planning import Decompositions, Task, assign, measure, placed, suited, told, usual
from rankfold.progress import Progress, silent
from rankfold.punctual import punctual_plan
from rankfold.recovery import Recovery
from rankfold.search import Search
from rankfold.search.curves import Curve
from rankfold.search.outline import outlines
from rankfold.search.trace import Trace
from rankfold.search.widths import Width
from rankfold.sharing import place
from rankfold.training import Training
from rankfold.units import (
    about_means,
    check_reachable,
    hidden_channels,
    measure_widths,
    timed_parts,
    with_metric,
    with_prices,
)

ALIGN = 8
"""What widths and ranks are multiples of where latency is limited and nothing else is said: others are slower."""


@dataclass(frozen=True)
class Result:
    """A compressed network and what was done to it.

    `before` and `after` are costs of the whole network, `seconds` the wall time of the compression; the plan holds the
    same layer by layer. `trace` is the history of the search, where it keeps one, `curves` what it chose from, as
    `rankfold.search.outline` draws it, `pictures` some of the calibration inputs where they were images.
    """

    model: nn.Module
    plan: Plan
    seconds: float
    trace: Trace | None = None
    curves: Mapping[str, Any] = field(default_factory=dict, repr=False)
    pictures: tuple[str, ...] = field(default=(), repr=False)

    @property
    def before(self) -> Cost:
        """Cost of the original network."""
        return self.plan.before

    @property
    def after(self) -> Cost:
        """Cost of the compressed network, measured on it."""
        return self.plan.after


def compress(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    decomposition: Decompositions | None = None,
    budget: Budget,
    search: str | Search = "exact",
    calibration: str | Calibration | Iterable[Any] | None = "auto",
    calibration_samples: int | None = None,
    sequential: bool = True,
    refine: int | Refining = 0,
    distil: int | Training = 0,
    align: int | None = None,
    memory: int | str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    progress: Progress = silent,
) -> Result:
    """A smaller network within `budget`, with a rank chosen for every layer; `model` is left untouched.

    Without a `decomposition` convolutions may become "cp3", matrices the SVD, and hidden activations may lose channels;
    where the latency is limited, "spatial" takes the place of "cp3", whose depthwise stages are slow.

    `search` is a name of `rankfold.search.SEARCHES`, or a search of your own settings, such as `Rene(...)`.

    `example_inputs` is a tensor, a tuple of positional or a dict of keyword arguments; MACs are those of one pass over
    them, so give a batch of one to read them per example. `include` and `exclude` are glob patterns of layers' names.

    With `calibration`, errors are those of the layers' outputs on some inputs, by which ranks are chosen and factors
    fitted: an iterable of unlabelled batches, or what `calibrate` measured on them; "synthetic" for inputs made from
    the network, `calibration_samples` of them; "none" (or None) for errors of the weights; "auto" for the one of the
    two that `rankfold.calibration.synthetic.advice` gives. Then every layer is fitted once more, in forward order, to
    the original's outputs from the compressed network's inputs, and biases and batch norms are corrected, unless
    `sequential` is false or the budget limits the error. From 32 inputs on these fits are kept only if the network is
    then as close to the original on those held back as without; with fewer, one that lost channels has none.

    With `refine`, blocks are then refined one after another by so many epochs of gradient descent on the calibration
    inputs, towards what the original's give; `rankfold.calibration.Refining` says more than their number.

    With `distil`, the whole network is at last trained for so many epochs towards what the original gives on the same
    inputs, of images also in its blocks, and the weights that come closest on inputs held back are kept;
    `rankfold.training.Training` says more.

    With "interpolative" among the decompositions ("auto" has it), channels of hidden activations can go as well: the
    layers around them get narrower, and what reads them rebuilds the others (`rankfold.network.channels` says which
    may). Widths are multiples of `align`, which is 8 on Linear layers wider than 64 unless given. Where it is given,
    and where the budget limits the latency, so are ranks.

    Errors of layers, and of widths, are weighed against each other by what they cost the network's output on a few
    calibration inputs that are held back for it, unless passes over one of them are too long.

    What is packed is opened first (attention, recurrent layers, experts, computed weights: `rankfold.network.opening`),
    and a layer that cannot be replaced stays as it is, with the reason in the plan. Embeddings, whose factors cost what
    reading a row does not, are left whole unless they are included or the budget cannot be met without them.

    A limit on the latency is one on the time of a pass over the example inputs, as they are (batch, memory format,
    device), with the threads that PyTorch has now. Layers are timed in the network, their other forms by themselves,
    and the plan that is found is timed beside the original, and sought again where it misses the limit. Of a model that
    `torch.compile` gave, it is the time of compiled networks that is limited; what comes out is not compiled yet.

    `memory` limits what is taken besides the networks and the inputs: bytes, or a text such as "4GB"; by default half
    of what is free. Where it is tight, moments are kept in files, and fewer passes wait in forward order.

    The result is never over budget and no layer is larger, in the budget's units, than it was. Deterministic: the same
    network and settings give the same plan. Raises a RankfoldError that says what to change.
    """
    made = study(
        model,
        example_inputs,
        decomposition=decomposition,
        budget=budget,
        search=search,
        calibration=calibration,
        calibration_samples=calibration_samples,
        sequential=sequential,
        refine=refine,
        distil=distil,
        align=align,
        memory=memory,
        include=include,
        exclude=exclude,
        progress=progress,
    )
    draft = made.drafted(budget, progress)
    made = replace(made, curves=(), widths=())  # they hold bases of every layer, which take as much as the network
    return made.recovered(draft, progress)


@dataclass(frozen=True)
class Study:
    """What `compress` measures of a network before it looks at the budget: networks of several sizes are made of one.

    `budget` is the one that it was made for, `seconds` the wall time that it took, which counts in every result.
    """

    model: nn.Module
    inputs: Inputs
    whole: Opened
    before: Cost
    layers: Layers
    curves: tuple[Curve, ...]
    widths: tuple[Width, ...]
    known: Calibration
    rebuilding: Mapping[str, Moment]
    budget: Budget
    search: str | Search
    recovery: Recovery
    memory: int
    whole_choice: bool
    settings: Mapping[str, Any]
    seconds: float

    @property
    def compiled(self) -> bool:
        """Whether latencies are those of compiled networks."""
        return bool(self.settings.get("timed", {}).get("compiled"))

    def compress(self, budget: Budget | None = None, *, progress: Progress = silent) -> Result:
        """A smaller network within the study's budget, or another of its kind, as `rankfold.compress` gives it.

        Raises BudgetError for a budget in other units, or if only one of the two limits the error, and where no plan
        meets it.
        """
        return self.recovered(self.drafted(budget or self.budget, progress), progress)

    def drafted(self, budget: Budget, progress: Progress = silent) -> Result:
        """A network within a budget as its plan makes it, without what is done to it on inputs afterwards."""
        start = time.perf_counter()
        if budget.units != self.budget.units or _limits_error(budget) != _limits_error(self.budget):
            raise BudgetError(f"the study is of budgets like {self.budget}, not {budget}; make another one for it")
        task = Task(
            self.model,
            self.inputs,
            self.whole,
            budget,
            placed(self.search, self.whole.model),
            self.before,
            self.whole_choice,
            self.compiled,
        )
        with limited(self.memory):
            found = punctual_plan(task, self.layers, self.curves, self.widths, progress=progress)
            plan = replace(found.plan, settings={**found.plan.settings, **self.settings})
            student, plan = apply_plan(
                self.model,
                plan,
                factors=found.factors,
                moments=self.known.moments,
                rebuilding=self.rebuilding,
                progress=progress,
            )
        drawn = outlines(self.curves, self.widths, next(iter(budget.units), "macs"))
        return Result(student, plan, self.seconds + time.perf_counter() - start, found.trace, drawn)

    def recovered(self, draft: Result, progress: Progress = silent) -> Result:
        """A drafted network with what is done to it on inputs; neither curves nor widths are needed for it."""
        start = time.perf_counter()
        with limited(self.memory):
            student, plan = self.recovery.apply(draft.model, self.whole.model, draft.plan, self.known, progress)
            plan = verified(self.model, student, plan, self.inputs)
        setattr(student, KNOWN_PLAN, plan)
        seconds = draft.seconds + time.perf_counter() - start
        return replace(draft, model=student, plan=plan, seconds=seconds, pictures=pictures(self.known.inputs))


def study(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    decomposition: Decompositions | None = None,
    budget: Budget,
    search: str | Search = "exact",
    calibration: str | Calibration | Iterable[Any] | None = "auto",
    calibration_samples: int | None = None,
    sequential: bool = True,
    refine: int | Refining = 0,
    distil: int | Training = 0,
    align: int | None = None,
    memory: int | str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    progress: Progress = silent,
) -> Study:
    """What is measured of a network once, for budgets of one kind: `study(…, budget=…)`, then its `compress`.

    What is given is as in `compress`.
    """
    start = time.perf_counter()
    with limited(memory) as allowed:
        decomposition = usual(budget) if decomposition is None else decomposition
        compiled, model = is_compiled(model), unwrapped(model)
        check_model(model)
        before = cost_of(model, example_inputs)
        check_copies(model, example_inputs)
        whole = opened(model, example_inputs)
        layers = find_layers(whole.model, example_inputs, include=include, exclude=exclude, closed=whole.closed)
        choices, layers = assign(layers, decomposition)
        named = calibration if isinstance(calibration, str) else ""
        blind = calibration is None or named == "none" or (named == "auto" and _limits_error(budget))
        choices = suited(choices, search, blind=blind)
        sets = hidden_channels(whole.model, example_inputs, layers, choices)
        if not blind:
            check_reachable(layers, choices, sets, before, budget)
        timing: dict[str, Any] = {}
        if LATENCY in budget.units:
            if place()[1] > 1:
                raise BudgetError("a limit on the latency is met by timing in one process; start one, not several")
            layers, sets, before = timed_parts(
                model, whole.model, example_inputs, layers, sets, before, compiled=compiled, progress=progress
            )
            choices = {layer.name: choices[layer.name] for layer in layers.found}
            timing = {"timed": {**timing_of(model, example_inputs), "compiled": compiled}}
            align = align or ALIGN
        known = calibrated(
            whole.model,
            with_metric(layers, choices, sets),
            example_inputs,
            calibration,
            samples=calibration_samples,
            of_weights=_limits_error(budget),
            progress=progress,
        )
        curves = measure(
            whole.model,
            layers,
            choices,
            units=budget.units,
            moments=known.moments,
            align=align or 1,
            progress=progress,
        )
        summed = bool(known.inputs) and not _limits_error(budget)
        in_order = sequential and summed
        recovery = Recovery(in_order, refine if isinstance(refine, Refining) else Refining(refine), distil)
        recovery.check(known)
        ordering, rebuilding = about_means(whole.model, example_inputs, known.moments, sets.found, in_order=in_order)
        widths, layers = measure_widths(whole.model, layers, sets, align=align, moments=ordering, progress=progress)
        if summed and (widths or known.held):
            curves, widths = with_prices(whole.model, curves, widths, known, progress)
        settings = {
            **provenance(known, in_order),
            **timing,
            **({"memory": allowed} if memory is not None or allowed < PLENTY else {}),
            "priced": any(one.price.errors for one in curves),
            "decomposition": told(decomposition, choices),
        }
        return Study(
            model,
            example_inputs,
            whole,
            before,
            layers,
            curves,
            widths,
            known,
            rebuilding,
            budget,
            search,
            recovery,
            allowed,
            include is not None,
            settings,
            time.perf_counter() - start,
        )


def _limits_error(budget: Budget) -> bool:
    return math.isfinite(budget.largest_error)
