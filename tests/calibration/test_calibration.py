"""Second moments: they are what makes a weight's error the error of the layer's output."""

from __future__ import annotations

import pytest
import torch
from conformance.cases import BATCHED, Case  # type: ignore[import-not-found]
from torch import nn

from rankfold import DataError
from rankfold.calibration import moments, sums
from rankfold.calibration.moments import calibrate
from rankfold.calibration.sums import MomentSum
from rankfold.decompositions.metric import Moment
from rankfold.network.finding import find_layers
from rankfold.network.kinds import known_kind, shape_of, weight_of


def calibrated(model: nn.Module, batches: list) -> moments.Calibration:
    return calibrate(model, find_layers(model, batches[0]).found, batches, shrink=False)


@pytest.mark.parametrize("case", BATCHED, ids=lambda case: case.label)
def test_energy_in_the_metric_is_that_of_the_layers_output(case: Case):
    """E‖W x‖² over positions is the mean square of the layer's own output, for every kind, stride, padding and group."""
    model = nn.Sequential(case.module).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(case.inputs, generator=generator) + 0.5 for _ in range(3)]
    moment = calibrated(model, batches).moments["0"]
    weight = weight_of(case.module).double()
    squares, positions = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            bias = case.module.bias
            out = case.module(batch)
            channel = 1 if known_kind(case.module).axes else -1
            if bias is not None:
                out = out - bias.reshape([-1 if axis == channel % out.ndim else 1 for axis in range(out.ndim)])
            squares += float(out.double().square().sum())
            positions += out.numel() // out.shape[channel]
    assert moment.positions == positions
    assert float(moment.energy(weight)) == pytest.approx(squares / positions, rel=1e-4)
    assert torch.allclose(moment.joint, moment.joint.mT)


def test_moments_do_not_depend_on_how_inputs_are_batched(small_cnn: nn.Module):
    images = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = calibrated(small_cnn, [images]).moments
    parts = calibrated(small_cnn, list(images.split(5))).moments
    for name, moment in whole.items():
        assert torch.allclose(moment.joint, parts[name].joint, rtol=1e-5, atol=1e-7)


def test_a_large_moment_is_a_kronecker_product_close_to_the_whole_one(
    small_cnn: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    generator = torch.Generator().manual_seed(1)
    smooth = nn.functional.avg_pool2d(torch.randn(16, 3, 12, 12, generator=generator), 5, 1, padding=0)
    whole = calibrated(small_cnn, [smooth]).moments["2"]
    monkeypatch.setattr(sums, "LARGEST_MOMENT", 100)
    product = calibrated(small_cnn, [smooth]).moments["2"]
    assert product.joint is None
    groups, inputs, taps = 1, product.inputs.shape[-1], product.taps.shape[-1]
    joined = torch.einsum("gij,gts->gitjs", product.inputs, product.taps).reshape(groups, inputs * taps, -1)
    assert float(joined.diagonal(dim1=-2, dim2=-1).sum()) == pytest.approx(
        float(whole.joint.diagonal(dim1=-2, dim2=-1).sum()), rel=1e-6
    )
    weight = weight_of(small_cnn[2]).double()
    assert float(product.energy(weight)) == pytest.approx(float(Moment(joined).energy(weight)), rel=1e-9)
    assert float(product.energy(weight)) == pytest.approx(float(whole.energy(weight)), rel=0.35)


def test_few_patches_are_mixed_with_the_identity_and_many_are_left_alone():
    """Fewer patches than dimensions: the rank grows to full, the trace stays, unseen inputs are predicted better."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(40, 40, generator=generator, dtype=torch.float64) / 40**0.5
    mixing *= torch.logspace(0, -1, 40, dtype=torch.float64)[:, None]
    truth = mixing @ mixing.mT
    errors, shares = [], []
    for count in (10, 100, 100_000):
        x = torch.randn(count, 40, generator=generator, dtype=torch.float64) @ mixing.mT
        moment = Moment((x.mT @ x / count)[None], positions=count)
        mixed = moment.shrunk().joint
        assert float(mixed.diagonal(dim1=-2, dim2=-1).sum()) == pytest.approx(float(moment.joint[0].trace()))
        errors.append((float((mixed[0] - truth).norm()), float((moment.joint[0] - truth).norm())))
        shares.append(moment.shrinkage())
    assert shares[0] > 0.3 > shares[1] > shares[2]
    assert shares[2] < 1e-3
    assert errors[0][0] < errors[0][1]
    assert torch.linalg.eigvalsh(Moment((x[:5].mT @ x[:5] / 5)[None], positions=5).shrunk().joint).min() > 1e-4


def test_shared_layers_add_up_and_uncalled_ones_are_named(image: torch.Tensor):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Conv2d(3, 3, 3, padding=1)
            self.extra = nn.Conv2d(3, 3, 3)

        def forward(self, x: torch.Tensor, deep: bool = True) -> torch.Tensor:
            x = self.shared(self.shared(x))
            return self.extra(x) if deep else x

    model = Network().eval()
    found = find_layers(model, image).found
    result = calibrate(model, found, [{"x": image, "deep": False}], source="one image")
    assert result.moments["shared"].positions == 2 * 64
    assert result.missing == {"extra": "never called on the calibration inputs"}
    assert (result.batches, result.source) == (1, "one image")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "are empty"),
        ([torch.zeros(2, 4, 8, 8)], r"batch 0, \(2, 4, 8, 8\) float32, does not fit the model"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.long)], "batch 1"),
        ([torch.full((2, 3, 8, 8), torch.nan)], "^0: its inputs during calibration are not finite"),
    ],
)
def test_unfit_inputs_are_refused_and_the_model_is_left_as_it_was(
    batches: list, message: str, small_cnn: nn.Module, image: torch.Tensor
):
    layers = find_layers(small_cnn, image).found
    small_cnn.train()
    with pytest.raises(DataError, match=message):
        calibrate(small_cnn, layers, iter(batches))
    assert small_cnn.training
    assert not any(module._forward_pre_hooks for module in small_cnn.modules())


class Projections(nn.Module):
    """Query, key and value of one tensor, or of others for the key in batches of fewer rows than three; then a head."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.query, self.key, self.value, self.head = (nn.Linear(6, 6) for _ in range(4))
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.query(x)
        if self.change == "in place":
            x.mul_(2)
        elif self.change == "sometimes" and len(x) < 3:
            x = 2 * x
        elif self.change == "omitted" and len(x) < 3:
            return self.head(query + self.value(x))
        return self.head(query + self.key(x) + self.value(x))


@pytest.mark.parametrize("change", ["never", "in place", "sometimes", "omitted"])
def test_layers_share_a_moment_if_they_read_the_same_tensor_in_every_pass(change: str):
    torch.manual_seed(0)
    model = Projections(change).eval()
    batches = [torch.randn(rows, 6) for rows in (4, 2, 5)]
    found = calibrated(model, [batch.clone() for batch in batches]).moments
    assert (found["query"] is found["key"]) == (change == "never")
    keys = {
        "never": batches,
        "in place": [2 * one for one in batches],
        "sometimes": [batches[0], 2 * batches[1], batches[2]],
        "omitted": [batches[0], batches[2]],
    }[change]
    for name, seen in (("query", batches), ("key", keys)):
        rows = torch.cat(seen).double()
        assert torch.allclose(found[name].joint[0], rows.T @ rows / len(rows), rtol=1e-5)


def test_passes_end_behind_the_last_layer_that_is_measured():
    model, calls = Projections("never").eval(), []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    layers = [one for one in find_layers(model, torch.randn(4, 6)).found if one.name != "head"]
    calls.clear()
    whole = calibrate(model, layers, [torch.ones(4, 6), torch.ones(3, 6), torch.ones(2, 6)], shrink=False)
    assert len(calls) == 2, "what looks for places, and the first pass, which shows that every layer is called once"
    assert {name: one.positions for name, one in whole.moments.items()} == dict.fromkeys(("query", "key", "value"), 9)


def test_a_sum_that_layers_share_takes_its_room_once(monkeypatch: pytest.MonkeyPatch):
    """Query, key and value read one tensor: where there is room for one sum and no second, one pass measures all."""
    model, batch = Projections("never").eval(), torch.randn(8, 6)
    layers = [one for one in find_layers(model, batch).found if one.name != "head"]
    one = MomentSum(shape_of(model.get_submodule("query")), torch.device("meta")).nbytes
    monkeypatch.setattr(moments, "share", lambda part: one)  # of sums, and of what is not kept in files
    stages: list[str] = []
    found = calibrate(model, layers, [batch], progress=lambda what, *_: stages.append(what))
    assert set(stages) == {"calibrating"}
    assert found.moments["query"].joint is found.moments["value"].joint


def test_narrow_passes_give_nearly_the_same_moments_in_the_same_precision(small_cnn: nn.Module):
    batch = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    layers = find_layers(small_cnn, batch).found
    exact, narrow = (calibrate(small_cnn, layers, [batch], narrow=one) for one in (False, True))
    assert (exact.narrow, narrow.narrow) == (False, True)
    distances = []
    for name, moment in exact.moments.items():
        near = narrow.moments[name].joint
        assert near.dtype == moment.joint.dtype
        distances.append(float((near - moment.joint).norm() / moment.joint.norm()))
    assert 0 < max(distances) < 0.02
