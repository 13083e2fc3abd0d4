"""Fits in forward order: towards the original's outputs, from what the compressed network really passes on."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conformance.cases import BATCHED, Case  # type: ignore[import-not-found]
from torch import nn

from rankfold import Budget, DataError, compress
from rankfold.calibration import forward_order
from rankfold.calibration.forward_order import LARGEST_CHANGE, refit_
from rankfold.network.costs import cost_of
from rankfold.network.finding import find_layers
from rankfold.network.kinds import known_kind, weight_of
from rankfold.network.surgery import apply_plan
from rankfold.plan import Plan
from rankfold.planning import assign, make_plan, measure


def planned(model: nn.Module, x: torch.Tensor, decomposition: str = "svd", budget: float = 0.4) -> Plan:
    choices, layers = assign(find_layers(model, x), decomposition)
    curves = measure(model, layers, choices, units=("params",))
    return make_plan(curves, layers, cost_of(model, x), budget=Budget(params=budget))


def smooth(count: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Correlated inputs that are not centred."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).cumsum(-1) / 2 + 0.5


@pytest.fixture
def normed() -> nn.Module:
    """Convolutions with batch norms that hold statistics, then a linear layer with a bias."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 12), (12, 16), (16, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    model.train()
    for seed in range(30):
        model(smooth(32, (3, 8, 8), seed))
    return model.eval()


def distance(model: nn.Module, student: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - student(x)).square().sum() / model(x).square().sum())


@pytest.mark.parametrize("decomposition", ["svd", "spatial", "tucker", "cp3"])
def test_the_network_comes_closer_to_its_original(normed: nn.Module, decomposition: str):
    batches = [smooth(64, (3, 8, 8), seed) for seed in (50, 51)]
    unseen = smooth(64, (3, 8, 8), 99)
    budget = Budget(params=0.4)
    apart, in_order = (
        compress(normed, unseen[:1], decomposition=decomposition, budget=budget, calibration=batches, sequential=way)
        for way in (False, True)
    )
    assert apart.plan.settings["fitted"] == "layer by layer"
    assert in_order.plan.settings["fitted"] == "in forward order"
    assert in_order.after == apart.after
    share = 0.9 if decomposition == "cp3" else 0.8
    assert distance(normed, in_order.model, batches[0]) < share * distance(normed, apart.model, batches[0])
    assert distance(normed, in_order.model, unseen) < distance(normed, apart.model, unseen)


@pytest.mark.parametrize("case", [c for c in BATCHED if c.label != "conv2d-depthwise"], ids=lambda case: case.label)
def test_every_layer_kind_gives_outputs_no_further_from_the_originals(case: Case):
    """The same layer behind one that changes its inputs; the bias is free, so the mean is right as well."""
    shape = (case.inputs[0] * 8, *case.inputs[1:])
    x = smooth(shape[0], shape[1:])
    model = nn.Sequential(nn.Identity(), copy.deepcopy(case.module)).eval()
    plan = planned(model, x, budget=0.9)
    student, plan = apply_plan(model, plan)
    student[0] = nn.Hardtanh(-1.0, 1.5)  # stands for earlier layers that lost something
    before = distance(model, student, x)
    refit_(student, model, plan, [x])
    assert plan.decomposed
    assert distance(model, student, x) < before
    if case.module.bias is not None:
        axis = 1 if known_kind(case.module).axes else -1
        with torch.no_grad():
            means = [out.movedim(axis, 0).flatten(1).mean(1) for out in (model(x), student(x))]
        torch.testing.assert_close(*means, atol=1e-4, rtol=1e-3)


def test_a_student_that_lost_nothing_stays_as_it_is(normed: nn.Module):
    x = smooth(64, (3, 8, 8), 7)
    plan = planned(normed, x[:1], budget=1.0)
    student, plan = apply_plan(normed, plan)
    exact = distance(normed, student, x)
    refit_(student, normed, plan, [x])
    assert distance(normed, student, x) <= exact + 1e-5


def test_batch_norms_get_the_change_of_their_inputs_statistics(normed: nn.Module):
    """Measured on inputs quite unlike those of training: what the norms hold moves by what compression changed."""
    x = smooth(256, (3, 8, 8), 3) * 2 - 1
    student, plan = apply_plan(normed, planned(normed, x[:1]))
    refit_(student, normed, plan, [x])
    seen: list[torch.Tensor] = []
    for model in (normed, student):
        handles = [model[k].register_forward_pre_hook(lambda m, args: seen.append(args[0])) for k in (1, 4, 7)]
        with torch.no_grad():
            model(x)
        for handle in handles:
            handle.remove()
    for place, k in enumerate((1, 4, 7)):
        original, held = normed[k], student[k]
        before, after = (seen[place + offset].movedim(1, 0).flatten(1) for offset in (0, 3))
        moved = after.mean(1) - before.mean(1)
        torch.testing.assert_close(held.running_mean, original.running_mean + moved, atol=2e-3, rtol=1e-2)
        ratio = (after.var(1) / before.var(1)).clamp(1 / LARGEST_CHANGE, LARGEST_CHANGE)
        torch.testing.assert_close(held.running_var, original.running_var * ratio, atol=1e-3, rtol=1e-2)


def test_layers_called_twice_are_fitted_to_all_their_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.shared = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.shared(torch.relu_(self.shared(torch.relu_(self.first(x)))))

    torch.manual_seed(0)
    model, x = Twice().eval(), smooth(400, (16,), 1)
    student, plan = apply_plan(model, planned(model, x[:1], budget=0.7))
    assert {layer.name for layer in plan.decomposed} == {"first", "shared"}
    before, bias = distance(model, student, x), student.shared[1].bias.clone()
    refit_(student, model, plan, [x])
    assert distance(model, student, x) < before
    assert torch.equal(student.shared[1].bias, bias)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_handful_of_single_examples_does_no_harm(count: int):
    """One position per batch, fewer than dimensions: the target stays near the weight, and everything finite."""
    torch.manual_seed(0)
    model, unseen = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval(), smooth(200, (16,), 5)
    student, plan = apply_plan(model, planned(model, unseen[:1], budget=0.7))
    before = distance(model, student, unseen)
    refit_(student, model, plan, list(smooth(count, (16,), 6).split(1)))
    assert distance(model, student, unseen) < 3 * before


def test_errors_of_the_plan_are_those_of_the_factors(normed: nn.Module):
    x = smooth(64, (3, 8, 8), 7)
    result = compress(normed, x[:1], decomposition="svd", budget=Budget(params=0.4), calibration=[x])
    plain, plan = apply_plan(normed, planned(normed, x[:1]))
    plan = refit_(plain, normed, plan, [x])
    layer = plan.decomposed[0]
    held = plain.get_submodule(layer.name)
    product = (held[1].weight.flatten(1) @ held[0].weight.flatten(1)).detach().double()
    weight = weight_of(normed.get_submodule(layer.name)).double().flatten(1).reshape(product.shape)
    error = float((weight - product).square().sum() / weight.square().sum())
    assert layer.error == pytest.approx(error, rel=1e-5)
    assert all(layer.error > 0 for layer in result.plan.decomposed)


def test_what_happens_on_the_way_leaves_no_trace(normed: nn.Module):
    x = smooth(8, (3, 8, 8), 7)
    student, plan = apply_plan(normed, planned(normed, x[:1]))
    normed.train()
    before = copy.deepcopy(normed.state_dict())
    with pytest.raises(DataError, match="batch 1"):
        refit_(student, normed, plan, [x, torch.zeros(2, 4, 8, 8)])
    assert normed.training
    assert all(torch.equal(before[name], value) for name, value in normed.state_dict().items())
    for model in (normed, student):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_which_calibration_is_taken_and_why(normed: nn.Module, small_cnn: nn.Module):
    x = smooth(1, (3, 8, 8))
    options = {"decomposition": "tucker", "budget": Budget(params=0.5)}
    settings = compress(normed, x, **options, calibration_samples=16).plan.settings
    assert settings["calibration"] == "synthetic inputs"
    assert settings["calibration_samples"] == 16
    assert settings["calibration_reason"] == "its 3 batch norms hold the statistics that inputs are matched to"
    settings = compress(small_cnn, x, **options, calibration_samples=16).plan.settings
    assert settings["calibration"] == "synthetic inputs"
    assert settings["calibration_reason"].startswith("noise with the spectrum of images, as it has no batch norms")
    vectors = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    settings = compress(vectors, torch.zeros(1, 16), decomposition="svd", budget=Budget(params=0.7)).plan.settings
    assert (settings["metric"], settings["calibration"]) == ("frobenius", "none")
    assert "no batch norms" in settings["calibration_reason"]
    limited = compress(normed, x, decomposition="tucker", budget=Budget(error=0.1)).plan.settings
    assert limited["metric"] == "frobenius"
    assert "limits the error" in limited["calibration_reason"]
    batches = (smooth(8, (3, 8, 8), seed) for seed in (1, 2))
    settings = compress(normed, x, **options, calibration=batches).plan.settings
    assert (settings["calibration"], settings["calibration_samples"]) == ("given inputs", 16)
    assert settings["fitted"] == "in forward order"


def test_inputs_that_hardly_vary_about_a_large_mean():
    """Their moment about the mean is lost in rounding, and may come out with negative eigenvalues."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 8)).eval()
    x = 1e4 + 1e-2 * torch.randn(64, 6)
    result = compress(model, x[:1], decomposition="svd", budget=Budget(macs=0.7), calibration=[x])
    with torch.no_grad():
        lost = (result.model(x) - model(x)).square().sum() / model(x).square().sum()
    assert lost < 1e-3


def test_moments_that_rounding_makes_indefinite_are_regressed_on_in_double(monkeypatch: pytest.MonkeyPatch):
    """Large systems are solved in float32, in which a moment of one direction is indefinite next to a small ridge."""
    monkeypatch.setattr(forward_order, "LARGEST_EXACT", 8)
    generator = torch.Generator().manual_seed(0)
    rows = 1e4 * torch.randn(3, 64, generator=generator, dtype=torch.float64)
    square = (rows.T @ rows)[None]
    square -= 1e-6 * square.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(64, dtype=torch.float64)
    weight = torch.randn(1, 4, 64, generator=generator, dtype=torch.float64)
    cross = weight @ square
    found = forward_order._regressed(weight, square, cross, 1e-9)
    assert torch.allclose(found @ square, cross, rtol=1e-3, atol=1e-3 * float(cross.abs().max()))


class Blocks(nn.Module):
    """Two blocks of a stream: a norm, and two layers of which the second one's outputs are added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Linear(12, 12)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.opening, self.closing = (
            nn.ModuleList(nn.Linear(*sides) for _ in range(2)) for sides in ((12, 24), (24, 12))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stream = self.start(x)
        for norm, opening, closing in zip(self.norms, self.opening, self.closing, strict=True):
            stream = stream + closing(torch.relu(opening(norm(stream))))
        return stream


def seen_of(model: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    """What goes into a module, one row for each place."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    return seen[0].flatten(0, -2)


def with_whole_closings(model: nn.Module, x: torch.Tensor) -> Plan:
    """A plan that decomposes what opens the blocks alone."""
    plan = planned(model, x, budget=0.5)
    layers = (
        replace(one, decomposition=None, ranks=(), after=one.before) if one.name.startswith("closing") else one
        for one in plan.layers
    )
    plan = plan.with_layers(tuple(layers))
    assert {"opening.0", "opening.1"} == {layer.name for layer in plan.changed}
    return plan


def test_what_joins_a_stream_makes_up_for_what_it_lacks():
    """What the last sum still lacks is no linear function of what its layer is given, which the plan leaves dense."""
    model, x = Blocks().eval(), smooth(300, (5, 12), 1)
    student, plan = apply_plan(model, with_whole_closings(model, x))
    assert isinstance(student.closing[1], nn.Linear)
    apart, factors = distance(model, student, x), copy.deepcopy(student.opening[1])
    plan = refit_(student, model, plan, [x])
    assert plan.settings["corrected_layers"] == ["closing.0", "closing.1"]
    with torch.no_grad():
        lacks = (model(x) - student(x)).flatten(0, -2)
    given = seen_of(student, "closing.1", x)
    assert distance(model, student, x) < 0.8 * apart
    torch.testing.assert_close(lacks.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    given, own = given - given.mean(0), lacks - lacks.mean(0)
    shares = (given.mT @ own).abs() / (given.norm(dim=0)[:, None] * own.norm(dim=0) + 1e-12)
    assert float(shares.max()) < 0.05
    for one, other in zip(factors.parameters(), student.opening[1].parameters(), strict=True):
        assert torch.equal(one, other)  # it reads what was made up for


def test_batch_norms_behind_what_joins_a_stream_keep_their_variance():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            stream, first, last = (lambda y, k=k: self.norms[k](self.layers[k](y)) for k in range(3))
            x = torch.relu(stream(x))
            return torch.relu(last(torch.relu(first(x))).add_(x))

    torch.manual_seed(0)
    model, x = Block(), smooth(64, (8, 6, 6), 3)
    for seed in range(20):
        model(smooth(64, (8, 6, 6), seed))
    model.eval()
    student, plan = apply_plan(model, planned(model, x, budget=0.4))
    assert len(plan.changed) == 3
    with torch.no_grad():
        before = float((model(x) - student(x)).square().mean())
    plan = refit_(student, model, plan, [x])
    assert plan.settings["corrected_layers"] == ["layers.2"]
    norms = zip(student.norms, model.norms, strict=True)
    assert [torch.equal(own.running_var, norm.running_var) for own, norm in norms] == [False, False, True]
    with torch.no_grad():
        assert float((model(x) - student(x)).square().mean()) < before
