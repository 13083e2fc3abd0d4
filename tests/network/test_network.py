from __future__ import annotations

import pytest
import torch
from networks import Tied
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold import Budget, ModelError, PlanError, UnknownNameError, compress
from rankfold.network.costs import cost_of
from rankfold.network.finding import find_layers
from rankfold.network.surgery import apply_plan


def test_shared_modules_and_tied_weights_stay_shared_and_are_decomposed_once():
    torch.manual_seed(0)
    model, tokens = Tied().eval(), torch.arange(6)[None]
    result = compress(model, tokens, decomposition="svd", budget=Budget(params=0.8), calibration="none")
    names = {layer.name: layer.aliases for layer in result.plan.decomposed}
    assert names.get("shared", ("again",)) == ("again",)
    assert names.get("first", ("second",)) == ("second",)
    assert names
    student = result.model
    assert student.shared is student.again
    assert student.first[0].weight is student.second[0].weight
    assert student.first[1].bias is not student.second[1].bias
    assert student.head.weight is student.embed.weight
    assert "left whole" in result.plan.skipped["embed"]
    assert result.after == cost_of(student, tokens)


class Doubling(nn.Linear):
    """A subclass that computes something else than its base."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + super().forward(2 * x)


class Awkward(nn.Module):
    """Layers that cannot be decomposed, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.special = Doubling(16, 16)
        self.unused = nn.Linear(16, 16)
        self.read = nn.Linear(16, 16)
        self.renormalised = nn.Embedding(9, 16, max_norm=1.0)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.whole = nn.Linear(16, 1)
        self.scores = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.special(self.plain(x)) + self.renormalised(torch.arange(5)) @ self.scores
        return self.whole(self.recurrent(nn.functional.linear(x, self.read.weight))[0])


def test_every_skipped_layer_is_listed_with_its_reason():
    model, x = Awkward().eval(), torch.randn(2, 5, 16)
    result = compress(model, x, decomposition="svd", budget=Budget(params=0.98), calibration="none")
    reasons = {
        "": "Awkward is not a kind",
        "special": "its forward multiplies by 2 weights",
        "unused": "not run on the example inputs",
        "read": "read by the model, past the layer",
        "renormalised": "renormalises",
        "recurrent": "step by step",
        "whole": "no rank makes it smaller",
    }
    for name, reason in reasons.items():
        assert reason in result.plan.skipped[name]
    listed = {layer.name for layer in result.plan.layers} | set(result.plan.skipped)
    carriers = {name for name, m in model.named_modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))}
    assert carriers <= listed


def test_hooks_go_over_to_what_stands_in_for_the_layer():
    model, seen = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval(), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    result = compress(model, torch.randn(2, 64), decomposition="svd", budget=Budget(params=0.5), calibration="none")
    seen.clear()
    result.model(torch.randn(3, 64))
    assert seen == [(3, 64)]


def test_a_transformer_layer_runs_after_surgery():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 7, 32)
    result = compress(model, x, decomposition="svd", budget=Budget(params=0.8), calibration="none")
    assert result.plan.decomposed
    with torch.no_grad():
        assert result.model(x).shape == (2, 7, 32)


def test_macs_are_those_of_the_flop_counter_and_attention_as_cpus_run_it():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 7, 32)
    counter = FlopCounterMode(display=False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counter, torch.no_grad():
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    attention = 2 * 4 * 7 * 7 * (8 + 8)
    assert cost_of(model, x).macs == counter.get_total_flops() // 2 + attention
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_original_is_untouched_and_its_mode_restored(small_cnn: nn.Module, image: torch.Tensor):
    small_cnn.train()
    small_cnn[1].eval()
    state = {name: tensor.clone() for name, tensor in small_cnn.state_dict().items()}
    result = compress(small_cnn, image, decomposition="spatial", budget=Budget(macs=0.6), calibration="none")
    assert all(torch.equal(tensor, state[name]) for name, tensor in small_cnn.state_dict().items())
    assert small_cnn.training
    assert not small_cnn[1].training
    assert not any(module._forward_hooks for module in small_cnn.modules())
    assert result.model.training


@pytest.mark.parametrize(
    ("option", "pattern"), [("include", "layer9.*"), ("exclude", "3"), ("decomposition", "linaer")]
)
def test_patterns_that_match_nothing_list_the_nearest_names(
    option: str, pattern: str, small_cnn: nn.Module, image: torch.Tensor
):
    given = {pattern: "svd"} if option == "decomposition" else [pattern]
    with pytest.raises(UnknownNameError, match="matches nothing; (nearest|known): "):
        compress(small_cnn, image, budget=Budget(macs=0.5), **{option: given}, calibration="none")


def test_include_and_exclude(small_cnn: nn.Module, image: torch.Tensor):
    result = compress(
        small_cnn,
        image,
        decomposition="svd",
        budget=Budget(macs=0.9),
        include=["0", "2"],
        exclude=["0"],
        calibration="none",
    )
    assert [layer.name for layer in result.plan.layers] == ["2"]
    assert result.plan.skipped == {"0": "excluded", "5": "not included"}


def test_what_shares_an_included_layer_s_weight_is_included_and_what_an_excluded_one_s_stays():
    torch.manual_seed(0)
    model, tokens = Tied().eval(), torch.arange(6)[None]
    found = find_layers(model, tokens, include=["first", "embed"]).found
    assert {layer.name: layer.aliases for layer in found} == {"embed": ("head",), "first": ("second",)}
    layers = find_layers(model, tokens, exclude=["second", "shared"])
    assert {layer.name for layer in layers.found} == {"embed"}
    assert layers.skipped["shared"] == layers.skipped["second"] == "excluded"
    assert "tied to second" in layers.skipped["first"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(value: float, small_cnn: nn.Module, image: torch.Tensor):
    small_cnn[2].weight.data[0, 0] = value
    with pytest.raises(ModelError, match=r"2\.weight: 9 of"):
        compress(small_cnn, image, budget=Budget(macs=0.5), calibration="none")


def test_models_that_cannot_be_compressed_say_why(small_cnn: nn.Module, image: torch.Tensor):
    budget = Budget(macs=0.5)
    with pytest.raises(ModelError, match="no parameters"):
        compress(nn.Sequential(nn.ReLU()), image, budget=budget, calibration="none")
    with pytest.raises(ModelError, match="no layer to decompose"):
        compress(nn.Sequential(nn.BatchNorm2d(3)), image, budget=budget, calibration="none")
    with pytest.raises(ModelError, match=r"does not run on example inputs \(1, 4, 8, 8\) float32"):
        compress(small_cnn, torch.zeros(1, 4, 8, 8), budget=budget, calibration="none")
    with pytest.raises(ModelError, match="meta device"):
        compress(nn.Linear(4, 4, device="meta"), torch.zeros(1, 4), budget=budget, calibration="none")
    with pytest.raises(ModelError, match="not initialised"):
        compress(nn.LazyLinear(4), torch.zeros(1, 4), budget=budget, calibration="none")


def test_a_model_that_is_one_layer_is_replaced_as_a_whole():
    model, x = nn.Linear(40, 40).eval(), torch.randn(3, 40)
    result = compress(model, x, decomposition="svd", budget=Budget(params=0.5), calibration="none")
    assert [layer.name for layer in result.plan.decomposed] == [""]
    assert result.model(x).shape == (3, 40)
    assert result.after == cost_of(result.model, x)


def test_a_plan_for_another_model_is_refused(small_cnn: nn.Module, image: torch.Tensor):
    plan = compress(small_cnn, image, decomposition="svd", budget=Budget(macs=0.6), calibration="none").plan
    with pytest.raises(PlanError, match="has no layer"):
        apply_plan(nn.Sequential(nn.Linear(3, 3)), plan)
    assert plan.decomposed[0].name == "2"
    small_cnn[2] = nn.Conv2d(16, 24, 5, stride=2, padding=2)
    with pytest.raises(PlanError, match=r"2: the plan says weight \(24, 16, 3, 3\), the model has \(24, 16, 5, 5\)"):
        apply_plan(small_cnn, plan)


def test_inputs_by_position_and_by_name():
    torch.manual_seed(0)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.left(a) + self.right(b)

    model, a = Pair().eval(), torch.randn(1, 32)
    by_position = compress(model, (a, a), decomposition="svd", budget=Budget(params=0.5), calibration="none")
    by_name = compress(model, {"a": a, "b": a}, decomposition="svd", budget=Budget(params=0.5), calibration="none")
    assert by_position.plan.layers == by_name.plan.layers


def test_layers_found_under_hooks_are_freed_of_them_when_the_model_fails(small_cnn: nn.Module):
    with pytest.raises(RuntimeError):
        find_layers(small_cnn, torch.zeros(1, 4, 8, 8))
    assert not any(module._forward_hooks for module in small_cnn.modules())


class Recurrent(nn.Module):
    """One block under two names, as in networks that share whole layers across their depth."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_a_block_under_two_names_stays_one_block():
    torch.manual_seed(0)
    model, x = Recurrent().eval(), torch.randn(1, 32)
    result = compress(model, x, decomposition="svd", budget=Budget(params=0.5), calibration="none")
    assert result.plan.decomposed[0].aliases == ("second.0",)
    assert result.model.first is result.model.second
    assert result.after == cost_of(result.model, x)
