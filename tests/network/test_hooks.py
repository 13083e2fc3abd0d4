"""Hooks last as long as their block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankfold.network.hooks import attached


def test_hooks_are_gone_after_the_block_that_fails_too():
    layers = [nn.Linear(2, 2), nn.Linear(2, 3)]
    seen: list[nn.Module] = []
    x = torch.zeros(1, 2)
    hooks = attached(layer.register_forward_hook(lambda module, args, output: seen.append(module)) for layer in layers)
    with pytest.raises(RuntimeError, match="shapes"), hooks:
        nn.Sequential(*layers, layers[0])(x)
    assert seen == layers
    layers[0](x)
    assert seen == layers
