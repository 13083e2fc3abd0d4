"""Prices: what errors of layers and of channels cost a network, measured one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from rankfold.calibration.moments import calibrate
from rankfold.decompositions import reconstruct
from rankfold.network.finding import find_layers
from rankfold.network.passes import run
from rankfold.planning import measure
from rankfold.reports.demo import digits
from rankfold.search import network_objectives
from rankfold.search.curves import Curve, Price
from rankfold.search.prices import TEMPERATURE, priced


class Branches(nn.Module):
    """Two layers, what one gives counting for a hundredth of what the other does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loud(x) + 0.01 * self.quiet(x)


def curves_of(model: nn.Module, x: torch.Tensor) -> tuple[Curve, ...]:
    layers = find_layers(model, x)
    moments = calibrate(model, layers.found, [x]).moments
    curves = measure(model, layers, {one.name: ("svd",) for one in layers.found}, moments=moments)
    return priced(model, curves, (), moments, [x])[0]


@pytest.mark.parametrize("logits", [1, 2**20])
def test_prices_are_divergences(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The price of an error that was made is what the network's output diverges by with it, however it is summed."""
    monkeypatch.setattr(network_objectives, "IN_PART", logits)
    model, x = Branches(), torch.randn(64, 24)
    (loud, _) = curves_of(model, x)
    assert loud.exact is not None
    (grid,) = loud.exact.grids()
    for error, loss in zip(loud.price.errors, loud.price.losses, strict=True):
        rank = int(grid.ranks[0][np.abs(grid.errors - error).argmin()])
        wrong = Branches()
        with torch.no_grad():
            wrong.loud.weight.copy_(reconstruct(loud.exact.wiring, loud.exact.factors((rank,)))[0])
        given, target = ((run(one, x) / TEMPERATURE).log_softmax(1) for one in (wrong, model))
        divergence = functional.kl_div(given, target, reduction="batchmean", log_target=True) * TEMPERATURE**2
        assert loss == pytest.approx(float(divergence), rel=1e-3)


def test_how_many_logits_are_compared_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the divergence nor its gradient, of dense predictions either."""
    own, taught = torch.randn(2, 5, 7, 3, 4, dtype=torch.float32).unbind()
    found = []
    for most in (1, 40, 2**22):
        monkeypatch.setattr(network_objectives, "IN_PART", most)
        given = own.clone().requires_grad_()
        loss = network_objectives.softened(given, taught, 2.0)
        found.append(torch.cat([loss[None], torch.autograd.grad(loss, given)[0].flatten()]))
    rows = ((one / 2).movedim(1, -1).log_softmax(-1).double() for one in (own, taught))
    expected = 4 * functional.kl_div(*rows, reduction="none", log_target=True).sum(-1).mean()
    assert float(found[0][0]) == pytest.approx(float(expected), rel=1e-5)
    assert all(torch.allclose(one, found[0], rtol=1e-5, atol=1e-8) for one in found[1:])


def test_what_hardly_counts_is_cheap() -> None:
    """A hundredth of the output is a ten-thousandth of the divergence."""
    (loud, quiet) = curves_of(Branches(), torch.randn(64, 24))
    at = np.array([0.1])
    assert 1e-5 < float(quiet.price.of(at)[0] / loud.price.of(at)[0]) < 1e-3


def test_a_network_that_is_sure_of_itself_pays_late() -> None:
    """Small errors hardly move its output: a line through the smallest would put large ones far too low."""
    model, data = digits()
    x = data.batch(0, 200)[0]
    prices = [one.price for one in curves_of(model, x) if len(one.price.errors) > 1]
    steeper = [p.losses[-1] / p.losses[0] / (p.errors[-1] / p.errors[0]) for p in prices]
    assert np.median(steeper) > 2


def test_prices_go_through_what_was_measured() -> None:
    price = Price((0.02, 0.1, 0.5), (0.001, 0.02, 0.8))
    assert price.of(np.array([0.02, 0.1, 0.5])) == pytest.approx([0.001, 0.02, 0.8])
    steep = np.log(0.8 / 0.02) / np.log(0.5 / 0.1)
    assert price.of(np.array([0.0, 0.01, 1.0])) == pytest.approx([0.0, 0.0005, 0.8 * 2**steep])
    errors = np.linspace(0, 1, 200)
    assert (np.diff(price.of(errors)) > 0).all()


def test_beyond_what_was_measured_prices_rise_at_least_in_proportion() -> None:
    for price in (Price((0.02, 0.1), (0.01, 0.012)), Price((0.02,), (0.01,))):
        far, twice = price.of(np.array([0.4, 0.8]))
        assert twice == pytest.approx(2 * far)


def test_without_a_price_errors_count_as_they_are() -> None:
    errors = np.array([0.0, 0.3, 1.0])
    assert (Price().of(errors) == errors).all()
    assert Price((1.0,), (2.0,)).of(errors) == pytest.approx(2 * errors)
