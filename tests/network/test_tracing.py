"""What a pass does with layers, as running it tells."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankfold.network.passes import run
from rankfold.network.tracing import held_behind


class Residual(nn.Module):
    """Two matrices with a stream around them, of which the second is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)  # no memory of its own
        stream = 2 * x
        stream = stream + self.back(torch.relu(self.wide(stream)))
        return self.back(self.wide(stream).sin())


def test_what_a_pass_holds_is_counted() -> None:
    """Behind a layer there are the stream and what the layer takes and gives; what nobody needs any more is gone.

    Neither inputs nor weights count, nor other views of either.
    """
    model, x = Residual(), torch.randn(5, 2, 4)
    with torch.no_grad():
        held = held_behind([model.wide, model.back], lambda: model(x))
    stream, wide = 5 * 8 * 4, 5 * 32 * 4
    assert held == {model.wide: stream + wide, model.back: stream + wide + stream}


def test_copies_of_inputs_are_what_a_pass_has_made() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(5, 8)
    assert held_behind([model[0]], lambda: run(model, x)) == {model[0]: 5 * 8 * 4 + 5 * 4 * 4}
