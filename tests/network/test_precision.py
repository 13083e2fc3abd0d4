"""Where passes may be in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rankfold.network import precision
from rankfold.network.precision import takes_bfloat16


class Refusing(nn.Linear):
    """A layer that multiplies float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        if super().forward(x).dtype != torch.float32:
            raise RuntimeError("float32 is all that is supported")
        return super().forward(x)


class Overflowing(nn.Linear):
    """A layer whose outputs are infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


@pytest.mark.parametrize(("kind", "taken"), [(nn.Linear, True), (Refusing, False), (Overflowing, False)])
@pytest.mark.parametrize("able", [True, False])
def test_a_model_has_to_compute_something_in_it(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Linear], taken: bool, able: bool
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: able)
    assert takes_bfloat16(kind(4, 3), torch.ones(2, 4)) == (taken and able)
