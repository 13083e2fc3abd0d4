"""Batches of inputs, cut and put together."""

from __future__ import annotations

import torch

from rankfold.network.passes import rejoined


def test_batches_are_put_together() -> None:
    inputs = torch.arange(22.0).reshape(11, 2)
    given = [{"x": part, "cache": False} for part in inputs.split([2, 4, 4, 1])]
    found = rejoined(given, 4)
    assert [len(one["x"]) for one in found] == [4, 4, 3]
    assert torch.equal(torch.cat([one["x"] for one in found]), inputs)
    assert not found[0]["cache"]


def test_batches_of_other_forms_stay_as_they_are() -> None:
    given = [torch.zeros(2, 3), torch.zeros(2, 4)]
    assert [one.shape for one in rejoined(given, 4)] == [(2, 3), (2, 4)]
    assert [one.shape for one in rejoined(given, 1)] == [(1, 3), (1, 3), (1, 4), (1, 4)], "but for their size"
