"""What counts of what layers give: how much a network's outputs depend on each place, and on each direction there.

A network that says one thing of many places may read it from a few: a vision transformer's class token stands for all
patches, and what its last layers give in these goes nowhere. Least squares over all places alike would fit what is not
used. So each has a weight: the root of the mean square of the gradient of log p(y|x) with respect to what a layer gives
there, with y drawn from the network's own distribution. The mean square itself is the trace of its part of the Fisher
information (Kunstner et al., arXiv 1905.12558, section 2). With it a few places are nearly all that is fitted to, for
which some hundreds of inputs are too few: DeiT-Tiny at 80 % of its MACs loses 7.7 points by it, by the root 6.2, and
with all places alike 8.7.

Nor do all directions of what a layer gives at a place count alike. Their metric is the root of G = E[g gᵀ] with the
same gradients g; G itself is that of infinitesimal errors, and no guide to those of strong compression.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional

from rankfold.calibration.patches import patches_of
from rankfold.network.blocks import first_tensor
from rankfold.network.hooks import attached
from rankfold.network.passes import (
    Inputs,
    arguments_of,
    copied,
    device_of,
    evaluating,
    examples_in,
    few,
    output_of,
    run,
    seeded,
    split,
)
from rankfold.network.tracing import gives_channels

EXAMPLES = 64
"""Inputs whose gradients are taken, at most."""
IN_PASS = 4
"""Of them together: everything that their passes compute is kept for the way back."""
UNEVEN = 4.0
"""How many times the mean the largest weight is where places are not taken for alike."""
LEAST = 0.05
"""Part of every weight, and of every metric, that does not depend on the gradients."""
LARGEST = 1024
"""Features of an output up to which they have a metric."""


@dataclass(frozen=True)
class Importance:
    """What counts of what modules give, by their names.

    `places` are the weights of places, of mean 1, where they are uneven; `outputs` metrics of features, of mean 1.
    """

    places: Mapping[str, Float64[Tensor, " positions"]] = field(default_factory=dict)
    outputs: Mapping[str, Float[Tensor, "1 features features"]] = field(default_factory=dict)


def importance(
    model: nn.Module, names: Iterable[str], batches: Iterable[Inputs], *, directed: bool = True
) -> Importance:
    """What counts of what some modules give, with metrics of features if they are to be `directed`.

    Only of outputs (examples, places…, features) of modules that are called once, and of a network that gives one row
    of numbers for an example; elsewhere, as of convolutions, all counts alike.
    """
    modules = {name: model.get_submodule(name) for name in names}
    parts = split(few(batches, EXAMPLES), IN_PASS)
    if not parts or not (seen := _with_places(model, modules, few(parts, 1)[0])):
        return Importance()
    squares: dict[str, Tensor] = {}
    outer: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        for name, gradient in _gradients(model, seen, part, generator).items():
            own = gradient.double().square().sum(-1).flatten(1).sum(0)
            if name in squares and len(squares[name]) != len(own):  # inputs of several lengths
                return Importance()
            squares[name] = squares.get(name, 0.0) + own
            if directed and gradient.shape[-1] <= LARGEST:
                rows = gradient.double().flatten(0, -2)
                outer[name] = outer.get(name, 0.0) + rows.mT @ rows
    roots = {name: total.sqrt() for name, total in squares.items() if 0 < total.sum() < torch.inf}
    weights = {name: root / root.mean() for name, root in roots.items()}
    places = {name: LEAST + (1 - LEAST) * one for name, one in weights.items() if one.max() > UNEVEN}
    return Importance(places, {name: _metric(outer[name]) for name in roots if name in outer})


def position_weights(
    model: nn.Module, names: Iterable[str], batches: Iterable[Inputs]
) -> Mapping[str, Float64[Tensor, " positions"]]:
    """The weights of the places of what some modules give, where they are uneven (`importance`)."""
    return importance(model, names, batches, directed=False).places


def _metric(outer: Float64[Tensor, "features features"]) -> Float[Tensor, "1 features features"]:
    """The root of a second moment of gradients, as a metric of mean 1."""
    values, vectors = torch.linalg.eigh(outer)
    values = values.clamp_min(0).sqrt()
    values = LEAST + (1 - LEAST) * values / values.mean()
    return ((vectors * values) @ vectors.mT)[None].float()


def by_row(weights: Tensor | None, x: Float[Tensor, "examples *places features"]) -> Float[Tensor, " rows"] | None:
    """The weight of each row of what goes into a module, or comes out; None where all count alike."""
    if weights is None or x[0, ..., 0].numel() != len(weights):
        return None
    return weights.to(x).repeat(len(x))


def weighted_square(given: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of squares of what a module gives, every place counted by its weight where there are some."""
    counts = by_row(weights, given)
    return given.square().sum() if counts is None else counts @ given.square().sum(-1).flatten()


def weighted_patches(
    module: nn.Module, x: Tensor, thinning: slice, weights: Tensor | None
) -> Iterator[tuple[Float[Tensor, "g rows n"], Float[Tensor, " rows"] | None]]:
    """Patches of what goes into a layer, some at a time, and their weights, None where all count alike."""
    own, start = by_row(weights, x), 0
    thinned = None if own is None else own[thinning]
    for patches in patches_of(module, x, thinning):
        end = start + patches.shape[1]
        yield patches, None if thinned is None else thinned[start:end]
        start = end


def _with_places(model: nn.Module, modules: Mapping[str, nn.Module], inputs: Inputs) -> dict[str, nn.Module]:
    """The modules that give a row of numbers for each of several places of an example, in one call."""
    found: dict[str, list[bool]] = {name: [] for name in modules}

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            first = first_tensor(output)
            placed = first is not None and first.ndim > 2 and len(first) == examples_in(inputs)
            found[name].append(placed and not gives_channels(module, cast(Tensor, first).ndim - 2))

        return note

    hooks = (module.register_forward_hook(watch(name)) for name, module in modules.items())
    with attached(hooks):
        output = output_of(run(model, inputs))
    if output.ndim > 2 or len(torch.atleast_1d(output)) != examples_in(inputs):
        return {}
    return {name: modules[name] for name, calls in found.items() if calls == [True]}


def _gradients(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: Inputs, generator: torch.Generator
) -> dict[str, Tensor]:
    """Gradients of what the network says of some inputs with respect to what modules give.

    Nothing where the network has no derivative, by an operator without one or tensors made for inference alone.
    """
    given: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            given[name] = cast(Tensor, first_tensor(output))

        return keep

    args, kwargs = arguments_of(copied(inputs, device_of(model)))
    frozen = [one for one in model.parameters() if one.is_floating_point() and not one.requires_grad]
    hooks = (module.register_forward_hook(watch(name)) for name, module in modules.items())
    try:
        with attached(hooks), evaluating(model), seeded(model), torch.enable_grad(), suppress(RuntimeError):
            for one in frozen:
                one.requires_grad_()
            said = _said(output_of(model(*args, **kwargs)), generator)
            gradients = torch.autograd.grad(said, list(given.values()), allow_unused=True)
            return {name: one for name, one in zip(given, gradients, strict=True) if one is not None}
    finally:
        for one in frozen:
            one.requires_grad_(False)
    return {}


def _said(output: Tensor, generator: torch.Generator) -> Tensor:
    """The sum of log p(y|x) with classes y that are drawn from p; of other outputs, that of them with random signs."""
    output = output.float()
    if output.ndim > 1 and output.shape[1] > 1:
        drawn = torch.multinomial(output.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        return -functional.cross_entropy(output, drawn.to(output.device), reduction="sum")
    signs = torch.randint(2, output.shape, generator=generator) * 2 - 1
    return (output * signs.to(output)).sum()
