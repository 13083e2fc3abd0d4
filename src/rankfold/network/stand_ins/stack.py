"""Stacks: several matrices in one tensor of three axes, of which a row of inputs meets one (experts).

The module that holds such a tensor indexes it and multiplies by what it gets. `Stack` takes the tensor's place: what an
index gives is a `Matrix`, and the product with it is a call of the stack, which can as well be one of factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Matrix:
    """One matrix of a stack: it can be multiplied by, and nothing else.

    `turned` says that it is meant transposed.
    """

    def __init__(self, stack: Stacked, index: Any, turned: bool = False) -> None:
        self.stack, self.index, self.turned = stack, index, turned

    @property
    def T(self) -> Matrix:  # noqa: N802
        """The transpose."""
        return Matrix(self.stack, self.index, not self.turned)

    mT = T  # noqa: N815

    def t(self) -> Matrix:
        """The transpose."""
        return self.T

    def transpose(self, first: int, second: int) -> Matrix:
        """The transpose."""
        return self.T if first % 2 != second % 2 else self

    def to(self, *_: Any, **__: Any) -> Matrix:
        """Itself: products are in the inputs' dtype and place."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stack."""
        return self.stack.dtype

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and isinstance(args[1], Matrix):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            out = args[1].stack.product(args[0], args[1].index, by_rows=not args[1].turned)
            return out if bias is None else out + bias
        if func in _PRODUCTS and isinstance(args[1], Matrix):
            return args[1].stack.product(args[0], args[1].index, by_rows=args[1].turned)
        return NotImplemented


_PRODUCTS: tuple[Callable[..., Any], ...] = (
    torch.matmul,
    torch.mm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
)


class Stacked(nn.Module):
    """What stands for a tensor of several matrices: an index gives a `Matrix`, and `forward` is the product with it.

    `by_rows` says that a matrix is kept as (outputs, inputs), not (inputs, outputs); None as long as nobody knows.
    """

    by_rows: bool | None

    def __getitem__(self, index: Any) -> Matrix:
        return Matrix(self, index)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        return next(self.parameters()).device

    def product(self, x: Tensor, index: Any, *, by_rows: bool) -> Tensor:
        """x times a matrix of the stack, whose rows (or else columns) are the outputs."""
        if self.by_rows not in (None, by_rows):
            raise TypeError("the matrices of a stack are multiplied both as they are and transposed")
        self.by_rows = by_rows
        return self(x, index)


class Stack(Stacked):
    """The tensor itself, as `weight` (matrices, rows, columns)."""

    def __init__(self, weight: nn.Parameter, by_rows: bool | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.by_rows = by_rows

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return self.weight.shape

    def forward(self, x: Tensor, index: Any) -> Tensor:
        """x (…, inputs) times one matrix."""
        matrix = self.weight[index]
        return functional.linear(x, matrix if self.by_rows else matrix.mT)


class FactorBlocks(nn.Module):
    """One factor of every matrix of a stack, one below the other: `weight` (matrices · rows, columns)."""

    def __init__(self, weight: nn.Parameter, count: int) -> None:
        super().__init__()
        self.weight = weight
        self.count = count

    def forward(self, x: Tensor, index: Any) -> Tensor:
        """x (…, columns) times the transpose of one block."""
        return functional.linear(x, self.weight.view(self.count, -1, self.weight.shape[1])[index])
