"""Precision: where passes that need not be exact are made in bfloat16."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from rankfold.network.passes import Inputs, device_of, run, tensors_in


def multiplies_bfloat16(device: torch.device | None) -> bool:
    """Whether a device has instructions for products of bfloat16; without them such passes are slower, not faster."""
    if device is None:
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def in_bfloat16(device: torch.device | None, *, enabled: bool) -> torch.autocast:
    """Passes with products in bfloat16, of weights and activations that are in float32, where that is `enabled`.

    Weights are narrowed whenever they are used, so that no second network is kept.
    """
    kind = device.type if device is not None else "cpu"
    return torch.autocast(kind, torch.bfloat16, enabled=enabled, cache_enabled=False)


def takes_bfloat16(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a device multiplies bfloat16 and a model computes something of inputs in it."""
    device = device_of(model)
    if multiplies_bfloat16(device):
        with suppress(Exception), in_bfloat16(device, enabled=True):  # what a model does not take is of many kinds
            return all(bool(one.isfinite().all()) for one in tensors_in(run(model, inputs)))
    return False
