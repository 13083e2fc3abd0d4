"""Where layers join a stream, as a pass tells."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rankfold.network.joins import LEAST_PLACES, Join, find_joins

IMAGES = (4, 6, 5, 5)
TOKENS = (3, 7, 6)


class Block(nn.Module):
    """A stream, and a branch of two layers whose outputs are added to it in some way."""

    def __init__(self, add: Callable[[Block, Tensor, Tensor], Tensor], images: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start, self.first, self.last, self.other = (
            nn.Conv2d(6, 6, 3, padding=1) if images else nn.Linear(6, 6) for _ in range(4)
        )
        self.norm, self.gain = nn.BatchNorm2d(6), nn.Parameter(torch.randn(6))
        self.norm.running_mean, self.norm.running_var = torch.randn(6), torch.rand(6) + 0.5
        nn.init.normal_(self.norm.weight)
        self.add, self.images = add, images

    def forward(self, x: Tensor) -> Tensor:
        stream = self.start(x)
        return self.add(self, stream, self.first(stream).relu())

    @property
    def example(self) -> Tensor:
        return torch.randn(IMAGES if self.images else TOKENS, generator=torch.Generator().manual_seed(1))


def joins_of(model: Block) -> dict[str, Join]:
    model.eval()
    names = {module: name for name, module in model.named_modules()}
    layers = [model.start, model.first, model.last, model.other]
    with torch.no_grad():
        return {names[layer]: join for layer, join in find_joins(model, layers, lambda: model(model.example)).items()}


def scaled(model: Block) -> Tensor:
    return model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()  # type: ignore[operator]


FOUND: dict[str, tuple[Block, Callable[[Block], Tensor]]] = {
    "a sum": (Block(lambda m, s, h: s + m.last(h)), lambda m: torch.ones(6)),
    "the other way round": (Block(lambda m, s, h: m.last(h) + s), lambda m: torch.ones(6)),
    "in place": (Block(lambda m, s, h: m.last(h).add_(s)), lambda m: torch.ones(6)),
    "a layer scale": (Block(lambda m, s, h: s + m.gain * m.last(h)), lambda m: m.gain),
    "a batch norm": (Block(lambda m, s, h: s + m.norm(m.last(h)), images=True), scaled),
    "in place behind a batch norm": (Block(lambda m, s, h: m.norm(m.last(h)).add_(s), images=True), scaled),
    "behind another layer": (Block(lambda m, s, h: m.other(h).sum() + (s + m.last(h))), lambda m: torch.ones(6)),
}


@pytest.mark.parametrize("label", FOUND)
def test_what_is_added_to_a_stream_is_found_with_its_scale(label: str):
    model, scale = FOUND[label]
    (found,) = joins_of(model).items()
    assert found[0] == "last"
    assert (found[1].module, found[1].output) == ("start", True)
    torch.testing.assert_close(found[1].scale.float(), scale(model).detach(), rtol=1e-3, atol=1e-4)


NOT_FOUND = {
    "a nonlinearity": Block(lambda m, s, h: s + m.last(h).sin()),
    "a product": Block(lambda m, s, h: s * m.last(h)),
    "a layer norm": Block(lambda m, s, h: s + nn.functional.layer_norm(m.last(h), [6])),
    "a constant": Block(lambda m, s, h: m.last(h) + 1.0),
    "a row for all": Block(lambda m, s, h: m.last(h) + m.gain),
    "a difference": Block(lambda m, s, h: torch.add(s, m.last(h), alpha=-1)),
    "called twice": Block(lambda m, s, h: s + m.last(m.last(h))),
    "nothing": Block(lambda m, s, h: m.last(h)),
}


@pytest.mark.parametrize("label", NOT_FOUND)
def test_what_is_no_sum_with_a_stream_is_no_join(label: str):
    assert "last" not in joins_of(NOT_FOUND[label])


def test_what_is_not_there_yet_when_a_layer_is_called_is_no_stream():
    """Of two branches that are added, the one that is called last can make up for the other."""
    found = joins_of(Block(lambda m, s, h: m.last(h) + m.other(h)))
    assert list(found) == ["other"]
    assert found["other"].module == "last"


def test_a_few_places_tell_nothing():
    model = Block(lambda m, s, h: s + m.last(h))
    x = torch.randn(LEAST_PLACES - 1, 6)
    assert not find_joins(model, [model.last], lambda: model(x))


@pytest.mark.parametrize("label", ["a layer scale", "a batch norm"])
def test_what_is_needed_makes_the_sum_what_it_was(label: str):
    model, _ = FOUND[label]
    model.norm.weight.data.abs_().clamp_(min=0.5)
    model.gain.data.abs_().clamp_(min=0.5)
    (join,) = joins_of(model).values()
    x = model.example
    with torch.no_grad():
        stream = model.start(x)
        hidden = model.first(stream).relu()
        own = stream + torch.randn(stream.shape)
        needed = join.needed(stream, own)
        whole = model.add(model, stream, hidden)
        model.last.register_forward_hook(lambda module, args, output: output + needed)
        torch.testing.assert_close(model.add(model, own, hidden), whole, rtol=1e-3, atol=1e-3)


def test_axes_may_be_swapped_on_the_way():
    """As in networks of images whose branches are matrices over channels that lie last."""

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.last, self.gain = nn.Conv2d(6, 6, 1), nn.Linear(6, 6), nn.Parameter(torch.rand(6) + 0.5)

        def forward(self, x: Tensor, needed: Tensor | float = 0.0) -> Tensor:
            stream = self.start(x)
            return stream + (self.gain * (self.last(stream.movedim(1, -1).relu()) + needed)).movedim(-1, 1)

    torch.manual_seed(0)
    model, x = Swapped().eval(), torch.randn(IMAGES)
    with torch.no_grad():
        (join,) = find_joins(model, [model.last], lambda: model(x)).values()
        assert (join.module, join.output, join.axis, join.axis_of_stream) == ("start", True, 3, 1)
        torch.testing.assert_close(join.scale.float(), model.gain.detach(), rtol=1e-3, atol=1e-4)
        stream = torch.randn(IMAGES)
        more = model(x, join.needed(stream, torch.zeros_like(stream))) - model(x)
        torch.testing.assert_close(more, stream, rtol=1e-3, atol=1e-3)


def test_streams_of_other_sizes_are_left_alone():
    join = Join("", False, torch.ones(6), 2, 2)
    assert join.needed(torch.randn(3, 7, 6), torch.randn(3, 7, 4)) == 0
