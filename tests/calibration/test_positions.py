"""Weights of places: where a network's outputs hang on a few of them, and what they change."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from rankfold import Budget, compress
from rankfold.calibration.moments import calibrate
from rankfold.calibration.positions import LEAST, Importance, by_row, importance, position_weights
from rankfold.network.finding import find_layers

PLACES, WIDTH = 33, 12


class Layer(nn.Module):
    """Attention of places to each other, and a perceptron in each."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.linear1, self.linear2 = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + (self.query(x) @ x.mT / WIDTH).softmax(-1) @ self.value(x)
        return x + self.linear2(self.linear1(x).relu())


class Encoder(nn.Module):
    """Two transformer layers over places, of which the first, or the mean of all, is read; or every one."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reads = reads
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head({"first": x[:, 0], "mean": x.mean(1), "all": x}[self.reads])


def inputs(count: int = 40, seed: int = 1) -> list[torch.Tensor]:
    """Batches in which the features of the first place have other sizes than those of all others."""
    x, sizes = (
        torch.randn(count, PLACES, WIDTH, generator=torch.Generator().manual_seed(seed)),
        torch.linspace(0, 2, WIDTH),
    )
    x[:, 0] *= sizes
    x[:, 1:] *= sizes.flip(0)
    return list(x.split(8))


def test_places_that_nothing_reads_have_the_least_weight():
    found = position_weights(Encoder("first").eval(), ["layers.0.linear1", "layers.1.linear2", "head"], inputs())
    assert "head" not in found, "it gives one row for an example"
    torch.testing.assert_close(found["layers.1.linear2"][1:], torch.full((PLACES - 1,), LEAST).double())
    assert found["layers.1.linear2"].mean() == pytest.approx(1)


@pytest.mark.parametrize("reads", ["mean", "all"])
def test_elsewhere_all_places_count_alike(reads: str):
    assert position_weights(Encoder(reads).eval(), ["layers.0.linear1", "layers.1.linear2"], inputs()) == {}


def test_directions_that_nothing_reads_count_least():
    """Of what a layer gives, features that the next one multiplies by zero, and sums of features that it takes away."""
    model = Encoder("first").eval()
    last = model.layers[1].linear2
    with torch.no_grad():
        model.head.weight[:, :3] = 0
        model.head.weight[:, 4] = -model.head.weight[:, 3]
    found = importance(model, ["layers.1.linear2", "head"], inputs())
    assert set(found.outputs) == {"layers.1.linear2"}, "the head gives one row for an example"
    (metric,) = found.outputs["layers.1.linear2"]
    assert metric.shape == (last.out_features, last.out_features)
    assert metric.trace() / len(metric) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(metric[:3], LEAST * torch.eye(len(metric))[:3], atol=1e-6, rtol=0)
    alike = torch.zeros(len(metric))
    alike[3:5] = 1
    torch.testing.assert_close(metric @ alike, LEAST * alike, atol=1e-5, rtol=0)


def test_the_network_stays_as_it_was():
    model = Encoder("first").train()
    model.layers[0].requires_grad_(False)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    flags = [one.requires_grad for one in model.parameters()]
    first, second = (position_weights(model, ["layers.1.linear2"], inputs()) for _ in range(2))
    assert torch.equal(first["layers.1.linear2"], second["layers.1.linear2"])
    assert model.training
    assert [one.requires_grad for one in model.parameters()] == flags
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.grad is None for one in model.parameters())


def test_a_network_without_a_derivative_counts_all_alike():
    with torch.inference_mode():
        model = Encoder("first").eval()
    assert position_weights(model, ["layers.1.linear2"], inputs()) == {}


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm2d(WIDTH)])
def test_rows_of_an_image_are_no_features(norm: Callable[[], nn.Module]):
    """What convolutions give has its channels before its places, though a few of them are all that is read."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), norm())
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(WIDTH * 64, 5)).eval()
    nn.init.zeros_(model[2].weight[:, 64:])
    names = ["0", "0.1"] if isinstance(block[1], nn.BatchNorm2d) else ["0"]
    assert position_weights(model, names, [torch.randn(4, 3, 8, 8)]) == {}


def test_where_gradients_are_not_finite_all_counts_alike():
    """Those of a root at zero are infinite."""

    class Rooted(Encoder):
        def __init__(self) -> None:
            super().__init__("first")
            self.rooted = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            given = self.rooted(x)
            return super().forward(x) + (given - given.detach()).sum((1, 2))[:, None].sqrt() * torch.arange(5.0)

    found = importance(Rooted().eval(), ["rooted", "layers.1.linear2"], inputs())
    assert set(found.outputs) == set(found.places) == {"layers.1.linear2"}


def test_inputs_of_several_lengths_count_alike():
    batches = [torch.randn(4, places, WIDTH) for places in (PLACES, PLACES - 1)]
    assert position_weights(Encoder("first").eval(), ["layers.1.linear2"], batches) == {}


def test_moments_are_weighted_means():
    model = Encoder("first").eval()
    layers = find_layers(model, inputs()[0][:1]).found
    known = calibrate(model, layers, inputs(), shrink=False)
    name = "layers.1.linear2"
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    with torch.no_grad():
        for batch in inputs():
            model(batch)
    x = torch.cat(seen)
    rows, weights = x.flatten(0, 1), by_row(known.weights[name], x)
    moment = known.moments[name]
    torch.testing.assert_close(moment.joint[0], (rows * weights[:, None]).T @ rows / weights.sum(), check_dtype=False)
    torch.testing.assert_close(moment.mean[0], weights @ rows / weights.sum(), check_dtype=False)
    assert moment.positions == round(float(weights.sum() ** 2 / weights.square().sum())) < len(rows)


def test_what_is_read_comes_out_closer(monkeypatch: pytest.MonkeyPatch):
    """At the same budget, on inputs that were not seen: with weights of places, and metrics beside them; in blocks too."""
    model = Encoder("first").eval()
    others = torch.cat(inputs(200, seed=2))

    def lost(counted: Importance, weights: Mapping[str, torch.Tensor], refine: int = 0) -> float:
        monkeypatch.setattr("rankfold.calibration.moments.importance", lambda *_: counted)
        monkeypatch.setattr("rankfold.calibration.refining.position_weights", lambda *_: weights)
        made = compress(
            model, others[:1], decomposition="svd", budget=Budget(params=0.5), calibration=inputs(400), refine=refine
        ).model
        with torch.no_grad():
            return float((made(others) - model(others)).square().mean())

    layers = find_layers(model, others[:1]).found
    counted = importance(model, [layer.name for layer in layers], inputs(400))
    places = Importance(counted.places)
    assert lost(counted, {}) < lost(places, {}) < lost(Importance(), {})
    blocks = position_weights(model, ["layers.0", "layers.1"], inputs(400))
    assert lost(places, blocks, refine=2) < lost(places, {}, refine=2)
