"""Costs: parameters, MACs and bytes of a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rankfold.budget import Cost
from rankfold.errors import ModelError
from rankfold.network.passes import Inputs, describe_inputs, run


def cost_of(model: nn.Module, inputs: Inputs) -> Cost:
    """What a network costs: parameters, MACs of one pass over `inputs`, bytes of its state; shared tensors once.

    MACs are half of what `torch.utils.flop_counter` knows: convolutions and every matrix product, attention included.
    Raises ModelError where the model does not run on the inputs.
    """
    counter = _FlopCounter()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer hides its products from the counter
    try:
        with counter:
            run(model, inputs)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"the model does not run on example inputs {describe_inputs(inputs)}: {reason}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    params = sum(parameter.numel() for parameter in model.parameters())
    state = {(t.data_ptr(), t.shape): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    return Cost(params, counter.flops // 2, size)


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
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        return out
