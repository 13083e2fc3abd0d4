"""What holds the outputs is solved for exactly: no step of it lowers the error, in any wiring."""

from __future__ import annotations

import pytest
import torch
from conformance.cases import CASES, NAMES  # type: ignore[import-not-found]
from decompositions.test_refine import moment_of  # type: ignore[import-not-found]

from rankfold.decompositions import energy_of, expand, fit, fitted_error, is_matrix, metric_error, wiring_of
from rankfold.decompositions.contractions import reconstruct
from rankfold.decompositions.metric import IDENTITY
from rankfold.decompositions.projected import projected, projected_loss
from rankfold.network.kinds import shape_of, weight_of

OTHERS = [name for name in NAMES if name != "svd"]
SOME = [case for case in CASES if case.label in ("conv2d", "conv2d-grouped", "transposed2d", "conv3d")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.label)
def test_the_error_has_no_slope_along_what_holds_the_outputs(case, name: str, dtype: torch.dtype) -> None:
    weight, shape, moment = weight_of(case.module).double(), shape_of(case.module), moment_of(case, 12)
    wiring = wiring_of(name, shape)
    assert not is_matrix(wiring)
    ranks = [2 for _ in wiring.bonds]
    start = expand(name, weight, shape).factors(ranks)
    found = projected(weight, wiring, start, moment, dtype=dtype)
    assert [one.shape for one in found] == [one.shape for one in start]
    assert metric_error(weight, wiring, found, moment) < metric_error(weight, wiring, start, moment)
    jointly = wiring.factors[-1] == "oB" and len(wiring.factors) == 3
    for place in (-2, -1) if jointly else (-1,):
        variables = list(found)
        variables[place] = variables[place].detach().requires_grad_()
        error = moment.energy(weight - reconstruct(wiring, tuple(variables))) / moment.energy(weight)
        (slope,) = torch.autograd.grad(error, variables[place])
        scale = float(found[place].norm()) / float(error.detach())
        assert float(slope.norm()) * scale < (1e-3 if dtype == torch.float64 else 1e-2)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.label)
def test_what_it_reaches_is_known_before_it_is_made(case, name: str) -> None:
    weight, shape, moment = weight_of(case.module).double(), shape_of(case.module), moment_of(case, 12)
    wiring, energy = wiring_of(name, shape), energy_of(weight, moment)
    ranks = [2 for _ in wiring.bonds]
    start = expand(name, weight, shape).factors(ranks)
    found = projected(weight, wiring, start, moment, dtype=torch.float64)
    loss = projected_loss(weight, wiring, start, moment, dtype=torch.float64, energy=energy)
    assert loss == pytest.approx(energy * metric_error(weight, wiring, found, moment), rel=1e-6)
    for metric in (moment, IDENTITY):
        options = {"sweeps": 4, "expansion": expand(name, weight, shape, metric), "moment": metric}
        fitted = fit(name, weight, shape, ranks, steps=0, **options)
        error = fitted_error(weight, shape, ranks, energy=energy_of(weight, metric), **options)
        assert error == pytest.approx(metric_error(weight, wiring, fitted, metric), rel=1e-6)
