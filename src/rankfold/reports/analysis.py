"""What could be saved, layer by layer, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from rankfold.budget import Cost
from rankfold.network.channels import Channels
from rankfold.network.checks import check_model
from rankfold.network.copies import unwrapped
from rankfold.network.costs import cost_of
from rankfold.network.finding import find_layers
from rankfold.network.kinds import weight_of
from rankfold.network.opening import opened
from rankfold.network.passes import Inputs
from rankfold.plan import INTERPOLATIVE, LayerSpec
from rankfold.planning import EVERY, Decompositions, assign
from rankfold.progress import Progress, silent
from rankfold.search.candidates import measure_layer
from rankfold.search.curves import Curve
from rankfold.units import hidden_channels

ENERGY = 0.9
"""Share of a layer's energy (one minus the squared relative error) at which savings are quoted."""


@dataclass(frozen=True)
class Saving:
    """The cheapest form of a layer that keeps `ENERGY` of it, as fractions of its parameters and MACs."""

    params_kept: float
    macs_kept: float
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Analysis:
    """A network's cost, its layers with what each decomposition saves on them (None: nothing), and the skipped ones.

    `channels` are the hidden activations that may lose channels, with why others may not.
    """

    cost: Cost
    layers: tuple[tuple[LayerSpec, Mapping[str, Saving | None]], ...]
    skipped: Mapping[str, str]
    channels: Channels = field(default_factory=lambda: Channels((), {}))

    @property
    def within_reach(self) -> dict[str, float]:
        """The share of the network's parameters and MACs that is in layers that can be decomposed."""
        dense = [layer.dense for layer, _ in self.layers]
        return {
            unit: sum(getattr(cost, unit) for cost in dense) / max(getattr(self.cost, unit), 1)
            for unit in ("params", "macs")
        }

    def as_dict(self) -> dict[str, Any]:
        """The analysis in JSON's types."""
        layers = [
            {
                "name": layer.name,
                "aliases": list(layer.aliases),
                "kind": layer.kind,
                "shape": list(layer.weight),
                **layer.dense.as_dict(),
                "savings": {
                    name: {**vars(saving), "ranks": list(saving.ranks)} if saving else None
                    for name, saving in savings.items()
                },
            }
            for layer, savings in self.layers
        ]
        return {
            **self.cost.as_dict(),
            "within_reach": self.within_reach,
            "energy": ENERGY,
            "layers": layers,
            "skipped": dict(self.skipped),
            "channels": [
                {
                    "read_by": [port.layer for port in one.consumers],
                    "made_by": [port.layer for port in one.producers],
                    "channels": one.size,
                    "parts": one.parts,
                }
                for one in self.channels.found
            ],
            "channels_that_stay": dict(self.channels.kept),
        }


def analyze(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    decomposition: Decompositions | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    progress: Progress = silent,
) -> Analysis:
    """Every layer of the model, its cost, and what each decomposition would save at nine tenths of its energy.

    Each is every one there is, unless some are named. A network without a layer to decompose has an analysis too: of
    its cost, and of the reasons.
    """
    model = unwrapped(model)
    check_model(model)
    cost = cost_of(model, example_inputs)
    whole = opened(model, example_inputs)
    layers = find_layers(whole.model, example_inputs, include=include, exclude=exclude, closed=whole.closed)
    if not layers.found:
        return Analysis(cost, (), layers.skipped)
    choices, layers = assign(layers, EVERY if decomposition is None else decomposition)
    rows = []
    for done, layer in enumerate(layers.found):
        progress("measuring layers", done, len(layers.found))
        weight = weight_of(whole.model.get_submodule(layer.name))
        names = [name for name in choices[layer.name] if name != INTERPOLATIVE]
        curves = {name: measure_layer(layer, weight, (name,)) for name in names}
        rows.append((layer, {name: _saving(curve) for name, curve in curves.items()}))
    progress("measuring layers", len(layers.found), len(layers.found))
    return Analysis(cost, tuple(rows), layers.skipped, hidden_channels(whole.model, example_inputs, layers, choices))


def _saving(curve: Curve) -> Saving | None:
    """The candidate of least MACs within the error, if it is not the layer itself."""
    within = np.flatnonzero(curve.errors <= 1 - ENERGY)
    best = int(within[curve.costs["macs"][within].argmin()])
    if curve.methods[best] is None:
        return None
    kept = {unit: float(curve.costs[unit][best]) / max(int(curve.costs[unit][0]), 1) for unit in ("params", "macs")}
    return Saving(kept["params"], kept["macs"], curve.ranks[best])
