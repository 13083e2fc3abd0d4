"""Which inputs are kept, and how well they stand for the others."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import cast

import pytest
import torch
from torch import Tensor

from rankfold.decompositions.interpolative import eliminate, entries, interpolated, interpolation_error, padded
from rankfold.decompositions.metric import IDENTITY, Moment


def made(outputs: int, channels: int, taps: int = 1, groups: int = 1, seed: int = 0) -> tuple[Tensor, Moment]:
    """A weight and the moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    size = channels // groups * taps
    weight = torch.randn(groups, outputs, channels // groups, *([taps] if taps > 1 else []), generator=generator)
    mix = torch.randn(groups, size, size, generator=generator, dtype=torch.float64).cumsum(-1)
    return weight.double(), Moment(joint=mix @ mix.mT / size, positions=10**6)


@pytest.mark.parametrize(("taps", "groups", "parts"), [(1, 1, 1), (3, 1, 1), (1, 2, 2), (2, 2, 2), (1, 1, 3)])
def test_errors_are_those_of_the_rebuilt_weight(taps: int, groups: int, parts: int) -> None:
    weight, moment = made(5, 12, taps, groups)
    found = eliminate(weight, moment, 12, parts)
    assert found.error(12) == 0
    for width in range(parts, 12, parts):
        kept = found.kept(width)
        assert len(kept) == width
        error = interpolation_error(weight, moment, torch.tensor(kept))
        assert found.error(width) == pytest.approx(error, rel=1e-6, abs=1e-9)
    assert (found.errors[1:] >= found.errors[:-1]).all()


@pytest.mark.parametrize("alike", [0.0, 1e-5])
def test_a_moment_in_float32_gives_the_same_order(alike: float) -> None:
    """Where inputs are nearly sums of others, too: it is not inverted in float32 then."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(1, 24, 24, generator=generator, dtype=torch.float64)
    mix[0, 12:] = mix[0, :12] + alike * mix[0, 12:] if alike else mix[0, 12:]
    narrow = Moment(joint=(mix @ mix.mT + 0.5 * (not alike) * torch.eye(24)).float())
    weight = torch.randn(1, 8, 24, generator=generator)
    found = eliminate(weight, narrow, 24, 1)
    exact = eliminate(weight, Moment(joint=cast(Tensor, narrow.joint).double()), 24, 1)
    assert found.order.tolist() == exact.order.tolist()
    assert found.errors == pytest.approx(exact.errors, rel=1e-5, abs=1e-12)


def test_outputs_that_count_little_have_little_say() -> None:
    """Channels are ordered, and their errors told, as those of the weight of which all outputs count alike."""
    weight, moment = made(10, 8)
    metric = torch.cov(torch.randn(10, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[None]
    two_sided = replace(moment, outputs=metric)
    found, expected = eliminate(weight, two_sided, 8, 1), eliminate(two_sided.counted(weight), moment, 8, 1)
    assert found.order.tolist() == expected.order.tolist()
    for width in range(1, 9):
        columns = entries(found.kept(width), 1)
        assert found.error(width) == pytest.approx(expected.error(width), abs=1e-9)
        assert interpolation_error(weight, two_sided, columns) == pytest.approx(found.error(width), rel=1e-3, abs=1e-5)
        assert torch.equal(interpolated(weight, two_sided, columns), interpolated(weight, moment, columns))


def test_near_the_best_of_all_subsets() -> None:
    for seed in range(6):
        weight, moment = made(4, 8, seed=seed)
        found = eliminate(weight, moment, 8, 1)
        for width in (2, 4, 6):
            best = min(
                interpolation_error(weight, moment, torch.tensor(kept)) for kept in combinations(range(8), width)
            )
            assert best * (1 - 1e-6) <= found.error(width) <= 2 * best + 1e-9


def test_better_than_chance() -> None:
    for seed in range(10):
        weight, moment = made(16, 48, seed=seed)
        found = eliminate(weight, moment, 48, 1)
        generator = torch.Generator().manual_seed(seed)
        subsets = (torch.randperm(48, generator=generator)[:24].sort().values for _ in range(200))
        assert found.error(24) < min(interpolation_error(weight, moment, one) for one in subsets)


def test_sums_of_others_cost_nothing() -> None:
    """Of inputs that hold only three independent ones, three are enough."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(1, 9, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 4, 9, generator=generator)
    found = eliminate(weight, Moment(joint=mix @ mix.mT), 9, 1)
    assert found.error(3) < 1e-4
    assert found.error(2) > 1e-3


@pytest.mark.parametrize("moment", [IDENTITY, Moment(joint=torch.zeros(1, 9, 9, dtype=torch.float64))])
def test_nothing_known_of_the_inputs(moment: Moment) -> None:
    """All inputs count alike: the smallest columns go first, and none is rebuilt."""
    weight = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0))
    found = eliminate(weight, moment, 9, 1)
    norms = weight[0].square().sum(0)
    assert found.order[0].tolist() == norms.argsort().tolist()
    columns = torch.tensor(found.kept(5))
    torch.testing.assert_close(interpolated(weight, moment, columns), weight[:, :, columns].double())


def test_neighbours_belong_together() -> None:
    weight, moment = made(5, 12)
    found = eliminate(weight, moment, 4, 1)
    columns = entries(found.kept(2), 3)
    assert len(columns) == 6
    assert found.error(2) == pytest.approx(interpolation_error(weight, moment, columns), rel=1e-6)


def test_padding() -> None:
    weight = torch.arange(12.0).reshape(2, 2, 3)
    wide = padded(weight, 5, torch.tensor([0, 2, 4, 6, 7, 9]))
    assert torch.equal(wide[0][:, [0, 2, 4]], weight[0])
    assert torch.equal(wide[1][:, [1, 2, 4]], weight[1])
    assert wide.count_nonzero() == weight.count_nonzero()
