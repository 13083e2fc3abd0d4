"""Checks: whether a network can be worked on at all, told before any work is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rankfold.errors import ModelError
from rankfold.network.copies import duplicate
from rankfold.network.passes import Inputs, run
from rankfold.network.tracing import Operands, holds_statistics


@torch.no_grad()
def check_model(model: nn.Module) -> None:
    """Raises ModelError for what is no network that can be worked on, or one with weights missing or not finite.

    Buffers may hold what they like (a mask is of minus infinity on purpose), but for the statistics of batch norms.
    """
    given: Any = model
    if not isinstance(given, nn.Module):
        hint = "; give the module that it was exported from" if "ExportedProgram" in type(given).__name__ else ""
        raise ModelError(f"the model is {type(given).__name__}, not a torch.nn.Module{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is scripted, and its layers cannot be replaced; give the module it was made from")
    if not any(True for _ in model.parameters()):
        raise ModelError(f"the model ({type(model).__name__}) has no parameters; there is nothing to compress")
    norms = [(name, module) for name, module in model.named_modules() if holds_statistics(module)]
    statistics = [(f"{name}.{kind}".lstrip("."), one) for name, norm in norms for kind, one in norm.named_buffers()]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise ModelError(f"{name}: the parameter is not initialised yet; run the model once before compressing it")
        if tensor.is_meta:
            raise ModelError(f"{name}: the tensor is on the meta device and has no values; load the weights first")
    for name, tensor in [*model.named_parameters(), *statistics]:
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise ModelError(f"{name}: {count} of {tensor.numel()} entries are NaN or infinite; use a sound checkpoint")


def check_copies(model: nn.Module, inputs: Inputs) -> None:
    """Raises ModelError where a copy of the model would run the layers of the original.

    So it is with a forward that was set on the instance and holds on to the instance; only such models are tried.
    """
    patched = [name or "the model" for name, module in model.named_modules() if "forward" in vars(module)]
    if not patched:
        return
    copied, kept = duplicate(model), {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    original: list[int] = []
    with Operands(read=lambda tensor: original.append(id(tensor)) if id(tensor) in kept else None):
        run(copied, inputs)
    if original:
        raise ModelError(
            f"{patched[0]}: its forward was set on the instance and holds on to the original, so that a copy of the "
            "model runs the original's layers; set it on the class, or bind it with types.MethodType"
        )
