"""Operators: what PyTorch's operators do with an axis of a tensor, as far as it is known.

An axis is given by its place and by `inner`, the number of neighbouring entries along it that belong together.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

Placed = tuple[int, int]
"""An axis and its inner entries."""

_UNARY = (
    "relu gelu silu sigmoid tanh hardtanh hardswish hardsigmoid clamp clamp_min clamp_max leaky_relu elu selu celu "
    "softplus mish log_sigmoid neg abs pow exp expm1 sqrt rsqrt square log log1p erf sign reciprocal rsub threshold "
    "_prelu_kernel prelu dropout native_dropout feature_dropout alpha_dropout clone contiguous _to_copy detach alias "
    "lift_fresh sin cos round floor"
)
ELEMENTWISE = frozenset(f"aten.{name}{suffix}" for name in _UNARY.split() for suffix in ("", "_"))
"""Operators that work entry by entry, on one tensor that matters."""
BINARY = frozenset(
    f"aten.{name}{suffix}" for name in ("add", "sub", "mul", "div", "maximum", "minimum") for suffix in ("", "_")
)
"""Operators that work entry by entry on two tensors, or on a tensor and a number."""
POOLS = {
    "aten.max_pool1d_with_indices": 1,
    "aten.max_pool2d_with_indices": 2,
    "aten.max_pool3d_with_indices": 3,
    "aten.max_pool2d": 2,
    "aten.avg_pool1d": 1,
    "aten.avg_pool2d": 2,
    "aten.avg_pool3d": 3,
    "aten._adaptive_avg_pool2d": 2,
    "aten._adaptive_avg_pool3d": 3,
    "aten.adaptive_max_pool2d": 2,
    "aten.upsample_nearest1d": 1,
    "aten.upsample_nearest2d": 2,
    "aten.upsample_bilinear2d": 2,
    "aten.upsample_bicubic2d": 2,
    "aten.upsample_nearest3d": 3,
    "aten.upsample_trilinear3d": 3,
    "aten.reflection_pad2d": 2,
    "aten.replication_pad2d": 2,
}
"""Operators that work on the last axes alone, with their number."""


def is_entrywise(args: Any, out: Tensor) -> bool:
    """Whether an elementwise operator acts on its first tensor by numbers alone."""
    first, *others = (one for one in args if isinstance(one, Tensor))
    return first.shape == out.shape and all(one.numel() == 1 for one in others)


def moved(op: str, args: Any, axis: int, inner: int, out: Any) -> Placed | None:
    """Where an axis is after an operator that rearranges axes, or takes part of others."""
    if not isinstance(out, Tensor) or not args or not isinstance(args[0], Tensor):
        return None
    rank = args[0].ndim
    if op == "aten.permute":
        return [dim % rank for dim in args[1]].index(axis), inner
    if op == "aten.transpose":
        first, second = (dim % rank for dim in args[1:3])
        return {first: second, second: first}.get(axis, axis), inner
    if op == "aten.t":
        return rank - 1 - axis, inner
    if op == "aten.unsqueeze":
        return axis + (args[1] % (rank + 1) <= axis), inner
    if op in ("aten.select", "aten.squeeze") and len(args) > 1 and isinstance(args[1], int):
        dim = args[1] % rank
        gone = out.ndim < rank
        return None if dim == axis and gone else (axis - (dim < axis and gone), inner)
    if op == "aten.expand":
        return axis + out.ndim - rank, inner
    if op == "aten.constant_pad_nd":
        return (axis, inner) if out.shape[axis] == args[0].shape[axis] else None
    if op == "aten.index_select":
        return None if args[1] % rank == axis else (axis, inner)
    return None


def reduced(op: str, args: Any, kwargs: Any, axis: int, inner: int) -> Placed | None:
    """Where an axis is after a mean, sum or extreme over others."""
    if op not in ("aten.mean", "aten.sum", "aten.amax", "aten.amin") or len(args) < 2:
        return None
    given = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
    gone = {dim % args[0].ndim for dim in given}
    if axis in gone or not gone:
        return None
    keep = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
    return axis - (0 if keep else sum(dim < axis for dim in gone)), inner


def reshaped(op: str, given: Tensor, axis: int, inner: int, out: Any) -> Placed | None:
    """Where an axis is after a reshape that keeps it whole, or joins it with axes behind it."""
    if op not in ("aten.view", "aten._unsafe_view", "aten.reshape", "aten.squeeze", "aten._reshape_alias"):
        return None
    before, size = math.prod(given.shape[:axis]), given.shape[axis]
    done = 1
    for place, extent in enumerate(out.shape):
        if done == before and extent != 1:
            behind = math.prod(given.shape[axis + 1 :])
            if extent % size or size == 1:
                return None
            extra, run = extent // size, 1
            for follower in given.shape[axis + 1 :]:
                if run == extra:
                    break
                run *= follower
            return (place, inner * extra) if run == extra and behind % extra == 0 else None
        done *= extent
    return None
