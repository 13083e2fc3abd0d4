"""Units: every candidate's cost and error are those of what it stands for, and nothing better is left out."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from blocks import BLOCKS, built  # type: ignore[import-not-found]
from torch import nn

from rankfold import Budget, BudgetError, compress
from rankfold.budget import Cost
from rankfold.calibration.moments import calibrate
from rankfold.network.channels import find_channels
from rankfold.network.costs import cost_of
from rankfold.network.finding import find_layers
from rankfold.objectives import Divergence
from rankfold.plan import ChannelSet, Port
from rankfold.planning import assign, measure
from rankfold.progress import silent
from rankfold.search import Problem, Rene, settle, units
from rankfold.search import search as known_search
from rankfold.search.forms import cost_at
from rankfold.search.units import UnitCurve, unit_curve
from rankfold.search.widths import units_of, width_grid
from rankfold.units import hidden_channels, measure_widths


def unit_of(name: str, decompositions: list[str]) -> tuple[nn.Module, UnitCurve]:
    model, x = built(name)
    return model, unit_in(model, x, decompositions)


def unit_in(model: nn.Module, x: torch.Tensor, decompositions: list[str]) -> UnitCurve:
    choices, layers = assign(find_layers(model, x), [*decompositions, "interpolative"])
    moments = calibrate(model, layers.found, [x]).moments
    curves = measure(model, layers, choices, units=("macs",), moments=moments)
    sets = hidden_channels(model, x, layers, choices)
    widths, layers = measure_widths(model, layers, sets, moments=moments)
    touched = {name for one in widths for name in (*one.channels.layers, *one.channels.between)}
    return unit_curve(widths, [curve for curve in curves if curve.layer.name in touched], ("macs",))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_first_candidate_is_the_unit_as_it_is(name: str) -> None:
    _, curve = unit_of(name, ["svd"])
    assert curve.errors[0] == 0
    assert not curve.choices[0].any()
    assert curve.costs["macs"][0] == sum(one.layer.dense.macs for one in curve.members)
    assert (np.diff(curve.costs["macs"]) <= 0).all()
    assert (np.diff(curve.errors) >= 0).all()


@pytest.mark.parametrize("name", ["bottleneck", "gate", "flattened"])
def test_no_combination_is_better(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all widths, dense layers alone: where nothing is thinned, every cost has an error as low on the curve."""
    monkeypatch.setattr(units, "FRONT", 10**6)
    monkeypatch.setattr(units, "CANDIDATES", 10**6)
    _, curve = unit_of(name, [])
    for places in product(*(range(len(one.widths)) for one in curve.sets)):
        error = sum(one.errors[place] for one, place in zip(curve.sets, places, strict=True))
        row = np.array([*places, *[0] * len(curve.members)])
        trial = UnitCurve(**{**vars(curve), "choices": row[None]})
        cost = sum(one.layer.cost(s).macs for one in curve.members for s in [trial.shapes(0)[one.layer.name]])
        within = curve.costs["macs"] <= cost
        assert curve.errors[within].min() <= error + 1e-12


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("decomposition", ["interpolative", ["svd", "interpolative"]])
def test_costs_are_those_of_the_network(name: str, decomposition: str | list[str]) -> None:
    model, x = built(name)
    result = compress(model, x[:1], decomposition=decomposition, budget=Budget(macs=0.7), calibration=[x])
    assert result.after == cost_of(result.model, x[:1])
    assert result.after.macs <= 0.7 * result.before.macs
    assert result.plan.narrowings or decomposition != "interpolative"


def test_guesses_within_units_are_fitted_before_they_are_relied_on() -> None:
    """A ring's error without a fit is a bound from below, which makes it look best where it is not."""
    _, curve = unit_of("transposed", ["ring"])
    most = int(curve.costs["macs"][next(k for k in range(len(curve)) if curve.guessed(k))])
    problem = Problem((curve,), {"macs": most}, Cost(0, 0, 0), Cost(0, int(curve.costs["macs"][0]), 0))
    assert curve.guessed(known_search("exact")(problem, silent).choices[0])
    selection = settle(problem, known_search("exact"))
    assert selection.curves is not None
    (found,), (chosen,) = selection.curves, selection.choices
    assert found.costs["macs"][chosen] <= most
    assert not found.guessed(chosen)


def test_searches_that_look_at_weights_know_no_units() -> None:
    """With "auto" they choose among ranks; asked for widths, they say that they cannot."""
    model, x = built("bottleneck")
    finder = Rene(objective=Divergence(model, [x]), iterations=1, turns=1)
    result = compress(model, x[:1], budget=Budget(macs=0.7), search=finder, decomposition="auto", calibration=[x])
    assert not result.plan.narrowings
    with pytest.raises(BudgetError, match="leave out 'interpolative'"):
        compress(model, x[:1], budget=Budget(macs=0.7), search=finder, decomposition="interpolative", calibration=[x])


def test_units_hang_together_by_layers() -> None:
    def one(name: str, *producers: str) -> ChannelSet:
        return ChannelSet(name, 8, tuple(Port(p) for p in producers), (Port(name),), (), 1, Cost(0, 0, 0))

    first, second, third, last = one("b", "a"), one("c", "b"), one("z", "y"), one("y", "c")
    assert units_of([first, third, second], {}) == [(third,), (first, second)] or units_of(
        [first, third, second], {}
    ) == [(first, second), (third,)]
    (whole,) = units_of([first, third, second, last], {})
    assert set(whole) == {first, second, third, last}


def test_widths_are_on_the_grid() -> None:
    def grid(size: int, linear: bool, align: int | None = None, parts: int = 1) -> tuple[int, ...]:
        return width_grid(ChannelSet("a", size, (), (), (), parts, Cost(0, 0, 0)), linear, align, 24)

    assert all(width % 8 == 0 for width in grid(1536, True))
    assert all(width % 16 == 0 for width in grid(96, False, align=16))
    assert {width % 8 for width in grid(60, True)} != {0}
    assert all(width % 32 == 0 for width in grid(256, False, parts=32))
    assert all(0 < width <= 50 for width in grid(50, False))
    assert grid(50, False)[0] == 50


def test_find_channels_needs_no_names() -> None:
    """Layers that must not change keep what they make and read."""
    model, x = built("bottleneck")
    layers = find_layers(model, x, exclude=["middle"])
    channels = find_channels(model, x, layers.found, layers.skipped)
    assert not channels.found
    assert "middle: excluded" in channels.kept["reduce"]


def test_a_long_row_is_searched_around_what_was_chosen() -> None:
    """Its widths are far apart at first; in the end no step of one width or form within the budget is better."""
    torch.manual_seed(0)
    sizes = [3, 40, 48, 32, 48, 40, 24, 10]
    layers = [one for a, b in pairwise(sizes) for one in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    model, x = nn.Sequential(*layers[:-1]), torch.randn(64, 3, 8, 8)
    curve = unit_in(model, x, ["svd"])
    assert len(curve.sets) == len(sizes) - 2
    most = int(0.4 * curve.costs["macs"][0])
    problem = Problem((curve,), {"macs": most}, Cost(0, 0, 0), Cost(0, int(curve.costs["macs"][0]), 0))
    at_first, found = known_search("exact")(problem, silent), settle(problem, known_search("exact"))
    assert found.objective < at_first.objective
    assert found.curves is not None
    (closer,), (chosen,) = found.curves, found.choices
    assert isinstance(closer, UnitCurve)
    assert 0.99 * most < closer.costs["macs"][chosen] <= most
    sizes = [*(len(one.widths) for one in curve.sets), *map(len, curve.members)]
    for place, size in enumerate(sizes):
        for step in (-1, 1):
            row = closer.choices[chosen].copy()
            row[place] += step
            if 0 <= row[place] < size:
                lost = sum(one.errors[k] for one, k in zip(curve.sets, row, strict=False))
                forms = row[len(curve.sets) :]
                lost += sum(one.errors[k] for one, k in zip(curve.members, forms, strict=True))
                shapes = UnitCurve(**{**vars(curve), "choices": row[None]}).shapes(0)
                cost = sum(
                    cost_at(one, int(k), shapes[one.layer.name]).macs
                    for one, k in zip(curve.members, forms, strict=True)
                )
                assert cost > most or lost >= found.objective - 1e-12


def test_what_is_smaller_than_all_that_was_fitted_is_fitted_first() -> None:
    """In the metric of few inputs the closed form says little of low ranks, and ratios found above them no more."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1)), torch.randn(2, 4, 4).expand(48, 2, 4, 4).transpose(0, 1)
    x = x + 0.1 * torch.randn(2, 48, 4, 4)
    choices, layers = assign(find_layers(model, x), "tucker")
    moments = calibrate(model, layers.found, [x]).moments
    (curve,) = measure(model, layers, choices, units=("macs",), moments=moments)
    fitted = [one.params for fits in curve.fits.values() for one in fits]
    small = [k for k in range(1, len(curve)) if curve.costs["params"][k] < min(fitted)]
    assert small
    assert all(curve.guessed(k) for k in small)
    most = int(curve.costs["macs"][small[0]])
    problem = Problem((curve,), {"macs": most}, Cost(0, 0, 0), Cost(0, int(curve.costs["macs"][0]), 0))
    selection = settle(problem, known_search("exact"))
    assert selection.curves is not None
    (found,), (chosen,) = selection.curves, selection.choices
    assert found.costs["macs"][chosen] <= most
    assert not found.guessed(chosen)
    assert found.fits != curve.fits
