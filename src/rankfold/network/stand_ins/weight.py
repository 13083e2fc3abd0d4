"""Layers whose weight is computed on every call, as stock layers around the weight as it comes out.

Weight and spectral normalisation, old and new, pruning masks, weight standardisation: whatever is done to the weight,
in the end it goes into one product. That call is watched, and what comes out is a stock layer with that weight, behind
TensorFlow's padding where the module pads by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from rankfold.network.factorised import carry_over_

_PRODUCTS = (
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
_SIZES = (9, 14, 17)
"""Sizes of inputs, along every axis and beyond the kernel's reach, on which the stock layer has to do the same."""
_CLOSE = 1e-4


class NotPlainError(Exception):
    """The module computes something else than one product with one weight."""


class SamePadding(nn.Module):
    """Zeros around the input, so that a convolution's output has the input's size over the stride, rounded up.

    As TensorFlow does it: at the end one more than at the start where their number is odd, depending on the size.
    """

    def __init__(self, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = tuple(kernel_size), tuple(stride), tuple(dilation)

    def forward(self, x: Tensor) -> Tensor:
        """The input with zeros along its last axes."""
        amounts: list[int] = []
        spans = zip(x.shape[-len(self.stride) :], self.kernel_size, self.stride, self.dilation, strict=True)
        for size, kernel, stride, dilation in spans:
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            amounts = [total // 2, total - total // 2, *amounts]
        return functional.pad(x, amounts)


def computes_weight(module: nn.Module) -> bool:
    """Whether a layer's weight is not a parameter of its own but made of others."""
    return parametrize.is_parametrized(module) or "weight" not in module._parameters


def computed(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """A module of the class `base` around the weight that `module`, of a class derived of it, computes.

    Where the module pads its input by itself, an `nn.Sequential` of the padding and the layer. Raises NotPlainError for
    a module that computes something else, as far as its tensors hold values.
    """
    padded = False
    for size in _SIZES:
        example = _example(module, size)
        with _Watch() as watch:
            module(example)
        if not watch.calls and not computes_weight(module):  # some other way of writing the product
            watch.calls.append((example, cast(Tensor, module.weight), cast("Tensor | None", module.bias)))
        if len(watch.calls) != 1:
            raise NotPlainError(f"its forward multiplies by {len(watch.calls)} weights")
        padded |= watch.calls[0][0].shape != example.shape
    made = _stock(module, base, *watch.calls[0][1:])
    if padded and getattr(module, "padding_mode", "zeros") == "zeros":  # in other modes stock layers pad ahead as well
        conv = cast(Any, made)
        made = nn.Sequential(SamePadding(conv.kernel_size, conv.stride, conv.dilation), made)
        conv.padding = (0,) * len(conv.stride)
    for size in _SIZES:
        x = _example(module, size)
        wanted, given = module(x), made(x)
        if wanted.shape != given.shape or not (wanted.is_meta or _close(wanted, given)):
            raise NotPlainError("it computes something else than a layer with its weight")
    return made.train(module.training)


class _Watch(TorchFunctionMode):
    """Keeps what every product is called with: input, weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            given = [*args, *(kwargs[name] for name in ("input", "weight", "bias") if name in kwargs), None][:3]
            self.calls.append((given[0], given[1], given[2]))
        return func(*args, **kwargs)


def _stock(module: Any, base: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A stock layer with the options of a module, around the given tensors."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
    options = {name: getattr(module, name) for name in names if hasattr(module, name)}
    if base is nn.Linear:
        made: Any = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    else:
        if "transpose" not in base.__name__.lower():
            options.pop("output_padding", None)
        made = base(module.in_channels, module.out_channels, module.kernel_size, bias=False, device="meta", **options)
    trained = any(parameter.requires_grad for parameter in module.parameters())
    made.weight = _parameter(weight, trained)
    made.bias = None if bias is None else _parameter(bias, trained)  # pyrefly: ignore[bad-argument-type]
    carry_over_(module, made)
    return cast(nn.Module, made)


def _parameter(tensor: Tensor, trained: bool) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().clone(), trained)


def _example(module: Any, size: int) -> Tensor:
    """Inputs for a module: random numbers from a fixed seed, so many beyond the kernel's reach along every axis."""
    place = next(module.parameters())
    if hasattr(module, "in_features"):
        shape = (3, module.in_features)
    else:
        reach = zip(module.kernel_size, module.dilation, strict=True)
        shape = (2, module.in_channels, *(kernel * dilation + size for kernel, dilation in reach))
    values = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(0))
    return values.reshape(shape).to(place.device, place.dtype)


def _close(wanted: Tensor, given: Tensor) -> bool:
    return torch.allclose(wanted, given, rtol=_CLOSE, atol=_CLOSE * float(wanted.abs().max()))
