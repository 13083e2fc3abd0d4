"""Turns: latencies of networks side by side, so that their ratios hold where a machine's speed drifts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from rankfold.errors import ModelError, reason_of
from rankfold.network.passes import Inputs, arguments_of, copied, device_of, evaluating, tensors_in


def latency(
    models: Sequence[nn.Module],
    inputs: Inputs,
    *,
    rounds: int = 30,
    warmup: int = 5,
    seconds: float = math.inf,
    compiled: bool = False,
) -> tuple[float, ...]:
    """Median milliseconds of one forward pass per model, the models taking turns in one run.

    Taking turns makes the ratios hold where the machine's speed drifts; absolute figures are of this machine, now.
    With `seconds` there are as many rounds, at least three and two to warm up, as take about so long. With `compiled`
    the times are those of what `torch.compile` makes of the models, for inputs of these shapes; what was compiled
    before is forgotten. Raises ModelError where it cannot.
    """
    with ExitStack() as stack:
        for model in dict.fromkeys(models):
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        run: Sequence[Callable[..., Any]] = _compiled(models, inputs) if compiled else models
        calls = [partial(_call, one, copied(inputs, device_of(model))) for one, model in zip(run, models, strict=True)]
        return in_turns(calls, rounds=rounds, warmup=warmup, seconds=seconds)


def in_turns(
    calls: Sequence[Callable[[], object]], *, rounds: int, warmup: int, seconds: float = math.inf
) -> tuple[float, ...]:
    """Median milliseconds of each of some calls, which take turns; rounds and seconds are as in `latency`."""
    if seconds < math.inf:
        start = time.perf_counter()
        for call in calls:
            call()
        affordable = int(seconds / max(time.perf_counter() - start, 1e-6))
        rounds, warmup = max(3, min(rounds, affordable)), max(2, min(warmup, affordable))
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + rounds):
        for call, taken in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            if turn >= warmup:
                taken.append(1e3 * (time.perf_counter() - start))
    return tuple(median(taken) for taken in samples)


def finished(device: torch.device) -> None:
    """Returns once all work on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _compiled(models: Sequence[nn.Module], inputs: Inputs) -> list[Callable[..., Any]]:
    """What `torch.compile` makes of some models; it forgets others first, as it compiles only so many of a class."""
    torch.compiler.reset()
    try:
        made: list[Callable[..., Any]] = [torch.compile(model, dynamic=False) for model in models]
        for model, one in zip(models, made, strict=True):
            _call(one, copied(inputs, device_of(model)))
    except Exception as error:
        raise ModelError(
            f"the network cannot be compiled here ({reason_of(error)}); time it as it is, or install what "
            "torch.compile needs, for CPUs a C++ compiler"
        ) from error
    return made


def _call(model: Callable[..., Any], inputs: Inputs) -> None:
    args, kwargs = arguments_of(inputs)
    model(*args, **kwargs)
    for tensor in tensors_in(inputs):
        finished(tensor.device)
