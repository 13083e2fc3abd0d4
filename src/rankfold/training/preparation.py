"""What a fine-tuning run is set up with: networks, factors, the optimiser, Accelerate's engine, precision."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import TrainingError
from rankfold.network.copies import duplicate, sharing
from rankfold.network.passes import Inputs
from rankfold.plan import Plan
from rankfold.training.distillation import Distillation
from rankfold.training.geometry import Geometry
from rankfold.training.settings import Training


def placed(model: nn.Module, device: torch.device, dtype: torch.dtype, layout: torch.memory_format | None) -> nn.Module:
    """A copy of a network on a device, in a type, and in a layout where one is given."""
    copied = duplicate(model).to(device, dtype)
    return copied.to(memory_format=layout) if layout is not None else copied  # pyrefly: ignore[no-matching-overload]


def read_only(
    model: nn.Module, device: torch.device, dtype: torch.dtype, layout: torch.memory_format | None
) -> nn.Module:
    """A network for passes without gradients: around its own tensors, where they are as `placed` would have them."""
    floating = (one for one in (*model.parameters(), *model.buffers()) if one.is_floating_point())
    as_it_is = layout is None and all((one.device, one.dtype) == (device, dtype) for one in floating)
    return (sharing(model) if as_it_is else placed(model, device, dtype, layout).requires_grad_(False)).eval()


def geometry_of(
    student: nn.Module, original: nn.Module | None, plan: Plan | None, training: Training
) -> Geometry | None:
    """The student's factors, where the plan is given and the settings make use of them."""
    if plan is None or not plan.decomposed or not (training.damping or training.steps_of_weights):
        return None
    if original is None:
        raise TrainingError("a plan needs the network it is of; give it as `original`, or as the teacher")
    return Geometry(student, original, plan)


def optimiser(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The optimiser; biases and norms are left out of weight decay."""
    named = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in named if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if training.optimiser == "adamw":
        plain = all(one.is_floating_point() and one.is_contiguous() for one in named)  # fused steps ignore strides
        fused = plain and {one.device.type for one in named} <= {"cpu", "cuda"}
        return torch.optim.AdamW(groups, lr=training.rate, betas=(training.momentum, 0.999), fused=fused)
    return torch.optim.SGD(groups, lr=training.rate, momentum=training.momentum, nesterov=training.momentum > 0)


def processes() -> Any:
    """This process's device and its place among all."""
    return _accelerate().PartialState()


def accelerator(precision: str) -> Any:
    """Accelerate's engine at a precision; its own record of an earlier run at another one is cleared."""
    accelerate = _accelerate()
    accelerate.state.AcceleratorState._reset_state()
    return accelerate.Accelerator(mixed_precision=precision, step_scheduler_with_optimizer=False)


def faster(student: nn.Module, distillation: Distillation, x: Inputs, y: Tensor) -> str:
    """bfloat16 where passes of it take less than nine tenths of the time of others, by a trial of two on this batch."""
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    seconds, place = {}, next(student.parameters()).device.type
    for precision in ("no", "bf16", "no", "bf16"):
        start = time.perf_counter()
        with torch.autocast(place, torch.bfloat16, enabled=precision == "bf16"):  # as Accelerate does, weights kept
            loss = torch.stack(list(distillation(student, x, y).values())).sum()
        loss.backward()
        loss.item()  # waits for the device
        seconds[precision] = time.perf_counter() - start  # the first of each is warming up
    student.load_state_dict(before)
    student.zero_grad(set_to_none=True)
    return _agreed("bf16" if seconds["bf16"] < 0.9 * seconds["no"] else "no")


def _accelerate() -> Any:
    """The package; raises TrainingError where it is not installed."""
    try:
        import accelerate
    except ImportError as error:
        raise TrainingError(
            f"training, and several processes, need accelerate: pip install 'rankfold[train]' ({error})"
        ) from error
    return accelerate


def _agreed(choice: str) -> str:
    """What the main process chose."""
    choices = [choice]
    _accelerate().utils.broadcast_object_list(choices)
    return choices[0]
