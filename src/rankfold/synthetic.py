"""Calibration inputs made from nothing but the network.

Natural images have a power spectrum that falls like 1/f² (an amplitude like 1/f; Field, J. Opt. Soc. Am. A 4, 1987),
and colours that go together. Noise of that kind, scaled to what normalised inputs look like, is the start. Where the
network has batch norms it is refined: each stores the mean and variance of what went through it in training, and
gradient descent on the inputs makes them hold again (Yin et al., DeepInversion, arXiv 1912.08795, equation 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfold.network import evaluating
from rankfold.progress import Progress, silent

CORRELATION = 0.9
"""Correlation between colours."""
STEPS = 60
"""Steps of gradient descent per batch."""
RATE = 0.1
"""Learning rate of these steps (Adam)."""
BATCH = 128
"""Inputs that are refined together."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def pink_noise(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "n ..."]:
    """Inputs of `shape`, channels first, whose amplitude falls like 1/f along all other axes; mean 0, variance 1.

    Channels are correlated as colours are. Inputs without other axes are standard normal.
    """
    if len(shape) < 2:
        return torch.randn(count, *shape, generator=generator)
    axes = tuple(range(2, len(shape) + 1))
    frequencies = torch.zeros([1] * len(axes))
    for axis, size in enumerate(shape[1:]):
        line = torch.fft.fftfreq(size).square()
        frequencies = frequencies + line.reshape([-1 if k == axis else 1 for k in range(len(axes))])
    amplitude = frequencies.sqrt().clamp_min(1 / max(shape[1:])).reciprocal()
    own = torch.randn(count, *shape, generator=generator)
    common = torch.randn(count, 1, *shape[1:], generator=generator)
    mixed = CORRELATION**0.5 * common + (1 - CORRELATION) ** 0.5 * own
    noise = torch.fft.ifftn(torch.fft.fftn(mixed, dim=axes) * amplitude, dim=axes).real
    return noise / noise.std()


def synthetic_inputs(
    model: nn.Module,
    shape: tuple[int, ...],
    count: int,
    *,
    seed: int = 0,
    steps: int = STEPS,
    progress: Progress = silent,
) -> list[Tensor]:
    """Batches of synthetic inputs, matched to the statistics that the network's batch norms hold, if it has any.

    The same seed gives the same inputs. The model is left as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    place = next(p for p in model.parameters() if p.is_floating_point())
    batches = [
        pink_noise(min(BATCH, count - start), shape, generator).to(place.device, place.dtype)
        for start in range(0, count, BATCH)
    ]
    norms = [module for module in model.modules() if isinstance(module, _NORMS) and module.running_mean is not None]
    if not norms:
        return batches
    total = steps * len(batches)
    refined = []
    for number, batch in enumerate(batches):
        x = batch.clone().requires_grad_()
        optimiser = torch.optim.Adam([x], lr=RATE)
        for step in range(steps):
            progress("making inputs", number * steps + step, total)
            with evaluating(model), torch.enable_grad(), _statistics(norms) as found:
                model(x)
                loss = torch.stack(found).mean()
                (x.grad,) = torch.autograd.grad(loss, [x])
            optimiser.step()
        refined.append(x.detach())
    progress("making inputs", total, total)
    return refined


@contextmanager
def _statistics(norms: list[Any]) -> Iterator[list[Tensor]]:
    """How far the inputs of each batch norm are from what it holds, filled in as the model runs."""
    found: list[Tensor] = []

    def compare(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, norm = args[0], cast(Any, module)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean, variance = x.mean(axes), x.var(axes, unbiased=False)
        held = norm.running_var + norm.eps
        found.append(
            ((mean - norm.running_mean).square() / held).mean() + ((variance / held + 1e-8).log()).square().mean() / 4
        )

    handles = [norm.register_forward_pre_hook(compare) for norm in norms]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
