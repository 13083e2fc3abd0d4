"""A user's file, not run: its types are checked strictly, so what the public surface gives has complete ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from typing_extensions import assert_type

import rankfold
from rankfold.budget import Cost
from rankfold.calibration import Calibration, calibrate
from rankfold.evaluation import accuracy, latency
from rankfold.files.export import finalize
from rankfold.network.finding import find_layers
from rankfold.objectives import Divergence
from rankfold.plan import LayerPlan
from rankfold.search import Rene
from rankfold.sources.data import Normalisation, open_dataset
from rankfold.training import Losses, Training, fine_tune


def compressed(model: nn.Module, x: torch.Tensor) -> rankfold.Result:
    """Budgets, decompositions, calibration, searches."""
    budget = rankfold.Budget(macs=0.5, params="300k", latency="8ms")
    result = rankfold.compress(model, x, decomposition=["svd", "interpolative"], budget=budget, calibration=[x])
    assert_type(result, rankfold.Result)
    assert_type(result.after, Cost)
    assert_type(result.after.macs, int)
    assert_type(result.plan.layers, tuple[LayerPlan, ...])
    assert_type(result.plan.skipped, Mapping[str, str])
    study = rankfold.study(model, {"x": x}, budget=budget)
    assert_type(study.compress(rankfold.Budget(macs=0.3)).model, nn.Module)
    assert_type(calibrate(model, find_layers(model, x).found, [x]), Calibration)
    return rankfold.compress(model, (x,), budget=budget, search=Rene(objective=Divergence(model, [x])))


def kept(result: rankfold.Result, model: nn.Module, x: torch.Tensor) -> None:
    """Files, scores, training, export."""
    assert_type(rankfold.save(result, "small"), Path)
    assert_type(rankfold.load("small", model), nn.Module)
    assert_type(rankfold.load_plan("small"), rankfold.Plan)
    assert_type(latency((model, result.model), x), tuple[float, ...])
    data = open_dataset("npz:train.npz", (3, 32, 32), Normalisation((0.0,), (1.0,)))
    assert_type(accuracy(model, data).top1, float)
    trained = fine_tune(
        result.model, data, teacher=model, plan=result.plan, losses=Losses(), training=Training(epochs=1)
    )
    assert_type(trained.model, nn.Module)
    assert_type(finalize("small", "small.onnx").bytes, int)
