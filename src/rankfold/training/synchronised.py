"""Batch norms over the batches of all processes together, on any device.

PyTorch's own synchronised batch norm needs a GPU. Here the sums go through a differentiable all-reduce, so that several
processes on CPUs train as one would on the whole batch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed.nn
from torch import Tensor, nn


def synchronise_norms_(model: nn.Module) -> None:
    """Makes every batch norm of the model use the statistics of all processes while it trains, in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = _Synchronised(module)  # pyrefly: ignore[bad-assignment, method-assign]


class _Synchronised:
    """The forward pass of a batch norm: its own in evaluation, over all processes in training."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        norm = cast(Any, self.norm)
        if not norm.training:
            return cast(Tensor, type(norm).forward(norm, x))
        axes = [axis for axis in range(x.ndim) if axis != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide.new_full((1,), x.numel() // x.shape[1])
        local = torch.cat([wide.sum(axes), wide.square().sum(axes), count])
        sums, squares, total = _summed(local).split([x.shape[1], x.shape[1], 1])
        mean = sums / total
        variance = (squares / total - mean.square()).clamp_min(0)
        if norm.track_running_stats:
            norm.num_batches_tracked.add_(1)
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            unbiased = variance.detach() * total / (total - 1)
            norm.running_mean.lerp_(mean.detach().to(norm.running_mean), share)
            norm.running_var.lerp_(unbiased.to(norm.running_var), share)
        shape = [1, -1] + [1] * (x.ndim - 2)
        out = (wide - mean.reshape(shape)) * (variance + norm.eps).rsqrt().reshape(shape)
        if norm.affine:
            out = out * norm.weight.reshape(shape) + norm.bias.reshape(shape)
        return out.to(x.dtype)


def _summed(x: Tensor) -> Tensor:
    """The sum over all processes, differentiable."""
    return cast(Tensor, torch.distributed.nn.functional.all_reduce(x))
