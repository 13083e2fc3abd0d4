"""Replays give what whole passes give."""

from __future__ import annotations

import pytest
import torch
from blocks import BLOCKS, built  # type: ignore[import-not-found]
from networks import Tied  # type: ignore[import-not-found]
from torch import Tensor, nn

from rankfold.network.passes import run, run_with, same, tensors_in
from rankfold.network.replay import Replay


class Leaving(nn.Module):
    """A layer that leaves what it gave where another one finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.noted = Noting()

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        return third(torch.relu(second(self.noted(first(x))))) + self.noted.seen


class Noting(nn.Module):
    """Keeps what it is given."""

    seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return torch.tanh(x)


def check(model: nn.Module, inputs: Tensor) -> None:
    model.eval()
    forwards = {name: vars(one).get("forward") for name, one in model.named_modules()}
    replay = Replay(model, inputs)
    for turn in range(2):
        for name, one in model.named_parameters(remove_duplicate=False):
            named = {name: one.detach() * (2 + turn)}
            with torch.no_grad():
                whole = run_with(model, named, inputs)
            assert same(tensors_in(replay(named)), tensors_in(whole)), name
    assert same(tensors_in(run(model, inputs)), tensors_in(replay.output))
    assert {name: vars(one).get("forward") for name, one in model.named_modules()} == forwards


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    check(*built(name))


def test_tied_and_repeated_layers() -> None:
    check(Tied(), torch.arange(12).view(2, 6))


def test_other_tensors_are_in_place_of_all_that_share_them() -> None:
    model, tokens = Tied().eval(), torch.arange(12).view(2, 6)
    before = run(model, tokens)
    for name in ("shared.weight", "again.weight", "first.weight", "second.weight", "head.weight"):
        other = Tied()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            other.get_parameter(name).mul_(2)
            given = run_with(model, {name: model.get_parameter(name).detach() * 2}, tokens)
        assert same(tensors_in(given), tensors_in(run(other, tokens))), name
        assert same(tensors_in(run(model, tokens)), tensors_in(before)), name
        assert isinstance(model.shared.weight, nn.Parameter)


def test_what_modules_leave_behind() -> None:
    check(Leaving(), torch.randn(4, 6))


@pytest.mark.parametrize("outputs", [4, 2, 0])  # room for those of all blocks, of two, of none
def test_what_comes_before_is_not_run_again(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the block that changes, as far as there is room; then blocks' outputs are kept before those inside."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(4)))
    x, done = torch.randn(2, 6), list[Tensor]()
    monkeypatch.setattr("rankfold.network.replay.share", lambda part, most: outputs * x.nbytes)
    replay, linear = Replay(model, x), nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        done.append(weight)
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    whole = run_with(model, named := {"2.0.weight": torch.zeros(6, 6)}, x)
    done.clear()
    assert same([replay(named)], [whole])
    assert len(done) == (4 if outputs else 8)


def test_narrow_passes_are_near_and_replayed_as_they_were() -> None:
    model, inputs = built("bottleneck")
    model.eval()
    exact, narrow = Replay(model, inputs), Replay(model, inputs, narrow=True)
    (whole,), (near,) = tensors_in(exact.output), tensors_in(narrow.output)
    assert near.dtype == torch.bfloat16
    assert 0 < float((near.float() - whole).norm()) < 0.05 * float(whole.norm())
    assert same(tensors_in(narrow({})), [near])
