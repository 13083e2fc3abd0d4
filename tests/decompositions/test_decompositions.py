"""Against TensorLy as the reference, hypothesis for shapes, and bad ranks."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.decomposition import parafac, partial_tucker, tensor_train
from tensorly.tenalg import svd_interface
from torch import nn

from rankfold import PlanError
from rankfold.decompositions import (
    DECOMPOSITIONS,
    als,
    damped,
    expand,
    fit,
    reconstruct,
    relative_error,
    scaled_gradients,
    sensitivity,
    wiring_of,
)
from rankfold.decompositions.als import alternate
from rankfold.decompositions.expansion import Factors
from rankfold.decompositions.wiring import LayerShape, Wiring
from rankfold.network.kinds import factorised, shape_of, stage_weights, weight_of

SHAPE = LayerShape(12, 10, (3, 3))


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    smooth = torch.linspace(1, 0.1, 12)[:, None, None, None] * torch.linspace(1, 0.2, 10)[:, None, None]
    return (torch.randn(12, 10, 3, 3) * smooth)[None].double()


def reference_error(approximation: np.ndarray, weight: torch.Tensor) -> float:
    exact = weight[0].numpy()
    return float(((approximation - exact) ** 2).sum() / (exact**2).sum())


def test_svd_and_spatial_are_the_truncated_svd(weight: torch.Tensor):
    for name, matrix in (
        ("svd", weight[0].reshape(12, -1)),
        ("spatial", weight[0].permute(1, 2, 3, 0).reshape(30, 36)),
    ):
        values = svd_interface(matrix.numpy(), method="truncated_svd", n_eigenvecs=min(matrix.shape))[1]
        for rank in (1, 4, 9):
            expected = (values[rank:] ** 2).sum() / (values**2).sum()
            factors = fit(name, weight, SHAPE, (rank,))
            assert relative_error(weight, wiring_of(name, SHAPE), factors) == pytest.approx(expected, rel=1e-9)


def test_tucker_is_the_truncated_hosvd_and_close_to_hooi(weight: torch.Tensor):
    ranks = (4, 5)
    ours = relative_error(weight, wiring_of("tucker", SHAPE), fit("tucker", weight, SHAPE, ranks))
    (core, factors), _ = partial_tucker(weight[0].numpy(), rank=[5, 4], modes=[0, 1], init="svd", n_iter_max=100)
    best = reference_error(tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1]), weight)
    assert best <= ours <= best * 1.15
    improved = relative_error(weight, wiring_of("tucker", SHAPE), fit("tucker", weight, SHAPE, ranks, sweeps=100))
    assert improved == pytest.approx(best, rel=1e-2)


def test_train_is_no_worse_than_tt_svd(weight: torch.Tensor):
    ranks = (5, 7, 6)
    ours = relative_error(weight, wiring_of("tt", SHAPE), fit("tt", weight, SHAPE, ranks))
    cores = tensor_train(weight[0].permute(1, 2, 3, 0).numpy(), rank=[1, *ranks, 1])
    theirs = reference_error(np.transpose(tl.tt_to_tensor(cores), (3, 0, 1, 2)), weight)
    assert ours <= theirs * 1.05


@pytest.mark.parametrize("name", ["cp", "cp3"])
def test_cp_is_close_to_the_better_of_two_reference_starts(name: str, weight: torch.Tensor):
    tensor = weight[0].numpy() if name == "cp" else weight[0].reshape(12, 10, 9).numpy()
    theirs = min(
        reference_error(
            tl.cp_to_tensor(parafac(tensor, rank=14, n_iter_max=100, init=init, random_state=0)).reshape(12, 10, 3, 3),
            weight,
        )
        for init in ("svd", "random")
    )
    ours = relative_error(weight, wiring_of(name, SHAPE), fit(name, weight, SHAPE, (14,)))
    assert ours <= theirs * 1.1


@pytest.mark.parametrize("name", list(DECOMPOSITIONS))
def test_alternating_least_squares_never_raises_the_error(name: str, weight: torch.Tensor):
    wiring = wiring_of(name, SHAPE)
    expansion = expand(name, weight, SHAPE)
    ranks = (2, 3, 5, 4) if name == "ring" else tuple(max(1, rank // 3) for rank in expansion.max_ranks())
    factors = expansion.factors(ranks)
    errors = [relative_error(weight, wiring, factors)]
    for sweeps in (1, 2, 4, 8, 16, 32):
        errors.append(relative_error(weight, wiring, alternate(weight, wiring, factors, sweeps=sweeps)))
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(errors, errors[1:], strict=False))


@pytest.fixture(scope="module", params=["cp", "cp3"])
def cancelling(request, weight: torch.Tensor) -> tuple[Wiring, Factors]:
    """A CP at a high rank, whose terms cancel each other."""
    return wiring_of(request.param, SHAPE), fit(request.param, weight, SHAPE, (24,), sweeps=400)


def test_damping_trades_a_little_error_for_terms_that_cancel_less(cancelling: tuple[Wiring, Factors]):
    wiring, factors = cancelling
    held, sensitivities, errors = reconstruct(wiring, factors), [sensitivity(wiring, factors)], [0.0]
    for damping in (1e-4, 1e-3, 1e-2):
        found = damped(wiring, factors, damping)
        sensitivities.append(sensitivity(wiring, found))
        errors.append(relative_error(held, wiring, found))
        terms = sensitivities[-1] * float(reconstruct(wiring, found).square().sum() / held.square().sum())
        assert errors[-1] + damping * terms < damping * sensitivities[0]
    assert sensitivities == sorted(sensitivities, reverse=True)
    assert errors == sorted(errors)
    assert sensitivities[2] < sensitivities[0] / 2
    assert errors[2] < 0.02


@pytest.mark.parametrize("name", ["cp", "cp3"])
def test_a_damped_term_that_stands_alone_is_shortened(name: str, weight: torch.Tensor):
    wiring = wiring_of(name, SHAPE)
    factors = fit(name, weight, SHAPE, (1,))
    expected = reconstruct(wiring, factors) / 1.25
    torch.testing.assert_close(reconstruct(wiring, damped(wiring, factors, 0.25)), expected)


def test_damping_does_not_depend_on_the_scale(cancelling: tuple[Wiring, Factors]):
    wiring, factors = cancelling
    larger = damped(wiring, tuple(10 * factor for factor in factors), 1e-3)
    expected = reconstruct(wiring, damped(wiring, factors, 1e-3)) * 10 ** len(factors)
    torch.testing.assert_close(reconstruct(wiring, larger), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_sensitivity_is_how_much_errors_of_the_entries_grow(cancelling: tuple[Wiring, Factors]):
    wiring, factors = cancelling
    held, noise, seen = reconstruct(wiring, factors), 1e-4, []
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        moved = tuple(
            one * (1 + noise * torch.randn(one.shape, generator=generator, dtype=one.dtype)) for one in factors
        )
        seen.append(relative_error(held, wiring, moved) / (noise**2 * len(factors)))
    assert np.mean(seen) == pytest.approx(sensitivity(wiring, factors), rel=0.15)


@pytest.mark.parametrize("name", sorted(set(DECOMPOSITIONS) - {"cp", "cp3"}))
def test_only_cp_is_damped(name: str, weight: torch.Tensor):
    wiring = wiring_of(name, SHAPE)
    factors = expand(name, weight, SHAPE).factors(tuple(2 for _ in wiring.bonds))
    assert damped(wiring, factors, 1e-2) is factors


def test_where_gram_matrices_are_too_large_the_scale_alone_is_taken_out(
    weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    wiring = wiring_of("ring", SHAPE)
    factors = expand("ring", weight, SHAPE).factors((2, 3, 2, 2))
    torch.manual_seed(0)
    gradients = [torch.randn_like(factor) for factor in factors]
    monkeypatch.setattr(als, "LARGEST_GRAM", 1)
    for scale in (1.0, 100.0):
        grown = tuple(scale * factor for factor in factors)
        found = scaled_gradients(wiring, grown, gradients, 0.0)
        for position, (step, gradient) in enumerate(zip(found, gradients, strict=True)):
            others = [(wiring.factors[k], one) for k, one in enumerate(grown) if k != position]
            letters = wiring.factors[position]
            mean = 1.0
            for part, bonds, _ in als._parts(letters, others, gradient):
                mean *= float(als._gram(part, bonds)[0].diagonal().mean())
            torch.testing.assert_close(step, gradient / mean)


def test_what_is_not_finite_stays_so(weight: torch.Tensor):
    wiring = wiring_of("cp3", SHAPE)
    factors = tuple(factor * float("nan") for factor in expand("cp3", weight, SHAPE).factors((4,)))
    assert not any(bool(one.isfinite().all()) for one in scaled_gradients(wiring, factors, factors, 0.01))


@pytest.mark.parametrize("name", list(DECOMPOSITIONS))
def test_a_scaled_step_is_the_gradient_of_the_weight_projected_on_what_a_factor_can_change(
    name: str, weight: torch.Tensor
):
    wiring = wiring_of(name, SHAPE)
    torch.manual_seed(0)
    ranks = (2, 3, 2, 2) if name == "ring" else tuple(3 for _ in wiring.bonds)
    factors = tuple(3.0 ** torch.randn(1).item() * one for one in expand(name, weight, SHAPE).factors(ranks))
    gradient = torch.randn_like(weight)
    variables = tuple(factor.clone().requires_grad_() for factor in factors)
    own = torch.autograd.grad((gradient * reconstruct(wiring, variables)).sum(), variables)
    for position, step in enumerate(scaled_gradients(wiring, factors, own, 1e-13)):

        def moved(factor: torch.Tensor, position: int = position) -> torch.Tensor:
            return reconstruct(wiring, (*factors[:position], factor, *factors[position + 1 :]))

        rest = gradient - moved(step)
        assert 0 < float(rest.norm()) < float(gradient.norm())
        assert abs(float((rest * moved(torch.randn_like(step))).sum())) < 1e-7 * float(gradient.norm() * step.norm())


def test_gram_matrices_and_svd_give_the_same_numbers():
    torch.manual_seed(0)
    weight = torch.randn(1, 40, 30, 3, 3)
    shape = LayerShape(40, 30, (3, 3))
    for name in ("svd", "spatial", "tucker", "tt"):
        for quick, precise in zip(
            expand(name, weight, shape).grids(), expand(name, weight.double(), shape).grids(), strict=True
        ):
            np.testing.assert_allclose(quick.errors, precise.errors, atol=1e-12)


def test_float64_weights_keep_structure_that_a_gram_matrix_would_lose():
    torch.manual_seed(0)
    left, right = torch.randn(20, 4).double(), torch.randn(4, 30).double()
    scales = torch.tensor([1.0, 1e-3, 1e-6, 1e-10]).double()
    weight = (torch.linalg.qr(left)[0] * scales @ torch.linalg.qr(right.T)[0].T)[None]
    shape = LayerShape(20, 30)
    errors = expand("svd", weight, shape).grids()[0].errors
    assert errors[2] == pytest.approx(1e-20, rel=1e-3)


@given(
    outputs=st.integers(1, 7), inputs=st.integers(1, 6), groups=st.integers(1, 3), kernel=st.lists(st.integers(1, 3), max_size=3),
    stride=st.integers(1, 3), padding=st.integers(0, 2), dilation=st.integers(1, 2), transposed=st.booleans(),
    name=st.sampled_from(sorted(DECOMPOSITIONS)), share=st.floats(0.2, 1.0),
)  # fmt: skip
def test_any_convolution_is_run_by_its_stages(
    outputs, inputs, groups, kernel, stride, padding, dilation, transposed, name, share
):
    torch.manual_seed(0)
    if not kernel:
        module, x = nn.Linear(inputs, outputs).double(), torch.randn(3, inputs).double()
    else:
        kinds = ((nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        kind = kinds[transposed][len(kernel) - 1]
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        module = kind(inputs * groups, outputs * groups, tuple(kernel), **options).double()
        x = torch.randn(2, inputs * groups, *[7] * len(kernel)).double()
    shape = shape_of(module)
    wiring = wiring_of(name, shape)
    ranks = [max(1, int(share * rank)) for rank in expand(name, weight_of(module), shape).max_ranks()]
    for _ in ranks:
        ranks = [min(rank, most) for rank, most in zip(ranks, wiring.largest_ranks(shape, ranks), strict=True)]
    factors = fit(name, weight_of(module), shape, ranks, sweeps=0)
    stages = factorised(module, wiring, ranks, stage_weights(module, wiring, factors))
    weight = reconstruct(wiring, factors)
    with torch.no_grad():
        module.weight.copy_((weight.transpose(1, 2) if shape.transposed else weight).reshape(module.weight.shape))
        try:
            expected = module(x)
        except RuntimeError:  # the kernel does not fit the input
            return
        torch.testing.assert_close(stages(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ranks", [(0, 4), (4, 99), (4,), (4, 4, 4)])
def test_ranks_out_of_range_name_layer_bond_and_range(ranks: tuple[int, ...], weight: torch.Tensor):
    with pytest.raises(PlanError, match=r"layer1\.conv: tucker"):
        fit("tucker", weight, SHAPE, ranks, layer="layer1.conv")


def test_zero_weights_are_reproduced():
    weight = torch.zeros(1, 6, 5, 3, 3)
    for name in DECOMPOSITIONS:
        expansion = expand(name, weight, LayerShape(6, 5, (3, 3)))
        factors = fit(name, weight, LayerShape(6, 5, (3, 3)), tuple(1 for _ in expansion.max_ranks()))
        assert relative_error(weight.double(), expansion.wiring, factors) == 0


@pytest.mark.parametrize(("name", "ranks"), [("ring", (4, 4, 12, 12)), ("ring", (2, 6, 15, 12)), ("tt", (10, 30, 12))])
def test_ranks_above_those_of_any_use_are_filled_up(name: str, ranks: tuple[int, ...]):
    """As a layer that lost channels may be given, whose ranks were chosen before."""
    weight = torch.randn(1, 12, 10, 3, 3, dtype=torch.float64)
    factors = fit(name, weight, SHAPE, ranks)
    sizes = wiring_of(name, SHAPE).sizes(SHAPE, list(ranks))
    expected = [(1, *wiring_of(name, SHAPE).factor_shape(k, sizes)) for k in range(len(factors))]
    assert [tuple(factor.shape) for factor in factors] == expected
    assert relative_error(weight, wiring_of(name, SHAPE), factors) < 1
