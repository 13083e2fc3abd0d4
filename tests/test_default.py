"""What `compress` does where nothing but a budget is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankfold import Budget, compress
from rankfold.search import SEARCHES


def batches(count: int) -> list[torch.Tensor]:
    return [torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_channels_may_go_as_well_as_ranks(small_cnn: nn.Module):
    result = compress(small_cnn, batches(1)[0][:1], budget=Budget(macs=0.5), calibration=batches(1))
    assert result.plan.settings["decomposition"] == ["cp3", "interpolative"]
    assert {layer.decomposition for layer in result.plan.layers} <= {"cp3", "svd", None}
    assert result.plan.narrowings
    assert result.after.macs <= 0.5 * result.before.macs


def test_a_limit_on_the_time_leaves_depthwise_stages_out(small_cnn: nn.Module):
    x = torch.randn(16, 3, 8, 8)
    result = compress(small_cnn, x, budget=Budget(latency=1.0), calibration=batches(1))
    assert result.plan.settings["decomposition"] == ["spatial", "interpolative"]


def test_a_limit_on_the_time_without_inputs_tells_what_was_left(small_cnn: nn.Module):
    x = torch.randn(16, 3, 8, 8)
    result = compress(small_cnn, x, budget=Budget(latency="60s"), calibration="none")
    assert result.plan.settings["decomposition"] == ["spatial"]


@pytest.mark.parametrize("search", SEARCHES)
def test_without_inputs_channels_stay(search: str, small_cnn: nn.Module):
    budget = Budget(macs=0.6)
    result = compress(small_cnn, batches(1)[0][:1], budget=budget, search=search, calibration="none")
    assert not result.plan.narrowings
    assert result.plan.settings["decomposition"] == ["cp3"]
    assert result.after.macs <= 0.6 * result.before.macs


def test_channels_that_are_asked_for_go_without_inputs_too(small_cnn: nn.Module):
    choices = ["cp3", "interpolative"]
    budget = Budget(macs=0.3)
    result = compress(small_cnn, batches(1)[0][:1], decomposition=choices, budget=budget, calibration="none")
    assert result.plan.narrowings


def test_few_inputs_are_enough_for_fits_in_forward_order(small_cnn: nn.Module):
    settings = compress(small_cnn, batches(1)[0][:1], budget=Budget(macs=0.8), calibration=batches(1)).plan.settings
    assert settings["fitted"] == "in forward order"
