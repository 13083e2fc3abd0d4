"""Costs: parameters, MACs and bytes of a network.

MACs are half of PyTorch's own flop formulas (`torch.utils.flop_counter`), with those it lacks: attention as it runs on
CPUs, products with one vector, fused recurrent layers, and grouped products of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rankfold.budget import Cost
from rankfold.errors import ModelError, reason_of
from rankfold.network.passes import Inputs, describe_inputs, run


def cost_of(model: nn.Module, inputs: Inputs) -> Cost:
    """What a network costs: parameters, MACs of one pass over `inputs`, bytes of its state; shared tensors once.

    MACs are those of convolutions and every matrix product, attention included. Raises ModelError where the model does
    not run on the inputs.
    """
    counter = _FlopCounter()
    try:
        with unfused(), counter:
            run(model, inputs)
    except Exception as error:
        raise ModelError(
            f"the model does not run on example inputs {describe_inputs(inputs)}: {reason_of(error)}"
        ) from error
    params = {storage_key(parameter): parameter.numel() for parameter in model.parameters()}
    state = {storage_key(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    return Cost(sum(params.values()), counter.flops // 2, size)


def storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that are the same numbers in memory, by whatever names."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


@contextmanager
def unfused() -> Iterator[None]:
    """Without PyTorch's fused encoder layer, which reads weights past their layers and hides its products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _FlopCounter(TorchDispatchMode):
    """Adds up the flops of PyTorch's own formulas; its FlopCounterMode does the same, after importing the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and saying so to the compiler would import it: two seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        formula = flop_registry.get(packet)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        elif str(packet) in _FORMULAS:
            self.flops += _FORMULAS[str(packet)](args)
        return out


def _attention(args: Any) -> int:
    """Queries (batch, heads, n, d) with keys, and what they weigh with values (batch, heads, m, e)."""
    query, key, value = (tensor.shape for tensor in args[:3])
    return 2 * int(query[:-1].numel() * key[-2]) * int(query[-1] + value[-1])


def _matrix_vector(matrix: Tensor) -> int:
    return 2 * matrix.numel()


def _recurrent(args: Any) -> int:
    """One direction of one layer: inputs (steps, batch, i), weights (gates, i) and (gates, hidden)."""
    x, input_weight, hidden_weight = args[:3]
    return 2 * int(x.shape[0] * x.shape[1]) * int(input_weight.numel() + hidden_weight.numel())


def _grouped(args: Any) -> int:
    """Rows (n, i), each times one of several matrices (g, i, o)."""
    return 2 * int(args[0].shape[0]) * int(args[1].shape[-2] * args[1].shape[-1])


_FORMULAS: dict[str, Callable[[Any], int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
    "aten.mv": lambda args: _matrix_vector(args[0]),
    "aten.addmv": lambda args: _matrix_vector(args[1]),
    "aten.dot": lambda args: 2 * int(args[0].numel()),
    "aten.mkldnn_rnn_layer": _recurrent,
    "aten._grouped_mm": _grouped,
    "transformers.grouped_mm_fallback": _grouped,
}
"""Flops by operator, from its positional arguments, of what PyTorch has no formula for."""
