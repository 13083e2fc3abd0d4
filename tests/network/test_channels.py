"""Which channels may go: found on the graph that runs, tried on the network, and taken away."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from blocks import BLOCKS, Bottleneck, built, images, tokens  # type: ignore[import-not-found]
from torch import Tensor, nn

from rankfold import PlanError
from rankfold.budget import Cost
from rankfold.network.channels import Channels, find_channels
from rankfold.network.copies import duplicate
from rankfold.network.costs import cost_of
from rankfold.network.finding import find_layers
from rankfold.network.narrowing import narrow_, permuted, tried
from rankfold.plan import ChannelSet, Narrowing, Port


def channels_of(model: nn.Module, x: Tensor) -> Channels:
    layers = find_layers(model, x)
    return find_channels(model, x, layers.found, layers.skipped)


def first(one: ChannelSet, width: int) -> Narrowing:
    run = one.size // one.parts
    kept = [part * run + k for part in range(one.parts) for k in range(width // one.parts)]
    return Narrowing(one, tuple(kept), one.through, Cost(0, 0, 0))


@pytest.mark.parametrize("name", BLOCKS)
def test_sets_are_found_and_sound(name: str) -> None:
    model, x = built(name)
    found = channels_of(model, x).found
    assert {one.name: one.size for one in found} == BLOCKS[name][2]
    assert tried(model, x, found) == (found, {})


@pytest.mark.parametrize("name", BLOCKS)
def test_all_channels_are_the_network_itself(name: str) -> None:
    model, x = built(name)
    for one in channels_of(model, x).found:
        whole = narrow_(duplicate(model), [first(one, one.size)])
        assert torch.equal(whole(x), model(x))


@pytest.mark.parametrize("name", BLOCKS)
def test_channels_that_do_nothing_can_go(name: str) -> None:
    """Where the readers ignore some channels, a network without them computes the same, in the memory it says."""
    model, x = built(name)
    (one, *_) = channels_of(model, x).found
    narrowing = first(one, one.size // 2)
    gone = torch.tensor([k for k in range(one.size) if k not in narrowing.kept])
    with torch.no_grad():
        for port in one.consumers:
            weight = model.get_submodule(port.layer).weight
            columns = (gone[:, None] * port.inner + torch.arange(port.inner)).flatten()
            if weight.shape[1] * getattr(model.get_submodule(port.layer), "groups", 1) == weight.shape[1]:
                weight[:, columns] = 0
            else:
                groups = model.get_submodule(port.layer).groups
                split = weight.view(groups, -1, *weight.shape[1:])
                for column in columns.tolist():
                    split[column // weight.shape[1], :, column % weight.shape[1]] = 0
    narrow = narrow_(duplicate(model), [narrowing])
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-4, atol=1e-5)
    half = Cost(*(value // 2 for value in vars(one.through).values()))
    before, after = cost_of(model, x), cost_of(narrow, x)
    assert before.params - after.params >= half.params
    assert after.macs < before.macs


class Reads(nn.Module):
    """Channels that something else than a layer takes as well."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.up, self.down, self.norm = nn.Linear(12, 24), nn.Linear(24, 12), nn.LayerNorm(24)
        self.other = nn.Linear(12, 24)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        if self.how == "norm":
            hidden = self.norm(hidden)
        if self.how == "softmax":
            hidden = hidden.softmax(-1)
        if self.how == "reshape":
            hidden = hidden.reshape(*hidden.shape[:-1], 2, 12).transpose(-1, -2).flatten(-2)
        if self.how == "product":
            return self.down(hidden) + (hidden @ hidden.mT).sum(-1, keepdim=True)
        if self.how == "cumulative":
            hidden = hidden.cumsum(-1)
        if self.how == "sum":
            hidden = hidden + self.other(x)
        if self.how == "twice":
            return self.down(hidden), hidden
        if self.how == "shifted":
            hidden = hidden * torch.arange(24)
        return self.down(hidden)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("norm", "native_layer_norm reads it"),
        ("softmax", "softmax reads it"),
        ("reshape", "reads it"),
        ("product", "reads it"),
        ("cumulative", "cumsum reads it"),
        ("sum", "residual stream"),
        ("twice", "the network gives it out"),
        ("shifted", "joins it with another activation"),
    ],
)
def test_channels_that_are_read_stay(how: str, reason: str) -> None:
    model, x = Reads(how), tokens()
    channels = channels_of(model, x)
    assert not channels.found
    assert reason in channels.kept["up"]


def test_tied_layers_keep_their_channels() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    model[2].weight = model[0].weight
    channels = channels_of(model, tokens())
    assert not channels.found
    assert "is shared with other layers" in channels.kept["0"]


def test_a_wrong_set_is_found_out() -> None:
    """Channels in another order show what a set misses."""
    model, x = Reads("norm"), tokens()
    model.norm.weight.data.uniform_()
    wrong = ChannelSet("down", 24, (Port("up"),), (Port("down"),))
    assert tried(model, x, [wrong]) == ((), {"down": "the order of its channels matters"})


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        ((), "no channel is kept of 16"),
        ((0, 16), "keeps channel 16 of 16"),
        ((3, 3), "a channel twice"),
        ((-1, 2), "keeps channel -1 of 16"),
    ],
)
def test_channels_that_are_not_there(kept: tuple[int, ...], told: str) -> None:
    model = Bottleneck().eval()
    (one, *_) = channels_of(model, images()).found
    with pytest.raises(PlanError, match=told):
        narrow_(model, [Narrowing(one, kept, one.through, one.through)])


def test_groups_keep_as_many() -> None:
    model = Bottleneck(4).eval()
    (one, *_) = channels_of(model, images()).found
    with pytest.raises(PlanError, match="unequally many channels of the 4 groups"):
        narrow_(model, [Narrowing(one, (0, 1, 4, 8, 12), one.through, one.through)])


def test_a_plan_of_another_network() -> None:
    model = Bottleneck().eval()
    (one, *_) = channels_of(model, images()).found
    with pytest.raises(PlanError, match="has no 'reduce'"):
        narrow_(nn.Sequential(nn.Linear(3, 3)), [first(one, 8)])
    other = dataclasses.replace(one, size=20)
    with pytest.raises(PlanError, match="20 channels do not fit its 16 outputs"):
        narrow_(model, [first(other, 20)])


def test_order_is_kept_within_groups() -> None:
    model, x = built("grouped")
    found = channels_of(model, x).found
    shuffled = narrow_(duplicate(model), [permuted(one, torch.Generator().manual_seed(3)) for one in found])
    torch.testing.assert_close(shuffled(x), model(x), rtol=1e-4, atol=1e-5)
