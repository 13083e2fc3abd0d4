"""Calibration inputs made from nothing but the network.

Natural images have a power spectrum that falls like 1/f² (an amplitude like 1/f; Field, J. Opt. Soc. Am. A 4, 1987),
and colours that go together. White noise coloured in that way is the start. Where the network has batch norms it is
refined: each stores the mean and variance of what went through it in training, and gradient descent on the inputs makes
them hold again (Yin et al., DeepInversion, arXiv 1912.08795, equation 4). What descends is the white noise behind the
inputs, so that they keep the spectrum and colours of images (Olah et al., Feature Visualization, Distill 2017, on
preconditioning).

Networks that take tokens are given some (`calibration/tokens`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfold.calibration.tokens import (
    batches_like,
    example_of,
    random_rows,
    tokens_of,
    writes,
    written_rows,
)
from rankfold.errors import DataError
from rankfold.network.hooks import attached
from rankfold.network.passes import Inputs, arguments_of, describe_inputs, evaluating, run
from rankfold.network.tracing import holds_statistics
from rankfold.progress import Progress, silent

SAMPLES, FEWEST = 512, 32
"""Inputs made by default, at most and at least."""
TOKENS = 2**13
"""Tokens of all of them together, about."""
POSITIONS = 2**19
"""Positions (pixels) of all of them together, between these bounds."""
LARGE, SMALLER = 192, 96
"""Smallest side from which on images are made of half the size, where a network takes them, and how many at least."""
CORRELATION = 0.9
"""Correlation between colours."""
STEPS, MORE_STEPS = 15, 30
"""Steps of gradient descent per batch, and those of small inputs, of which `SAMPLES` are made. They are most of the
time where images are large; ResNet-20 gains by more (`cp3` at 50, 30 and 20 % of the MACs: 91.4, 89.0 and 82.9 by 15,
91.5, 89.4 and 83.9 by 30)."""
RATE = 0.3
"""Learning rate of the first step (Adam); it falls to zero along a cosine."""
MOMENTUM = 0.5
"""Adam's weight of past gradients: with so few steps, less than usual."""
BATCH = 128
"""Inputs that are refined together."""


def pink_noise(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "n ..."]:
    """Inputs of `shape`, channels first, whose amplitude falls like 1/f along all other axes; mean 0, variance 1.

    Channels are correlated as colours are. Inputs without other axes are standard normal.
    """
    noise = coloured(torch.randn(count, *shape, generator=generator))
    return noise / noise.std()


def coloured(white: Float[Tensor, "n c *places"]) -> Float[Tensor, "n c *places"]:
    """White noise with channels correlated as colours are, and an amplitude like 1/f along all other axes."""
    if white.ndim < 3:
        return white
    channels, sizes, axes = white.shape[1], white.shape[2:], tuple(range(2, white.ndim))
    square = torch.zeros([1] * len(sizes))
    for axis, size in enumerate(sizes):
        line = torch.fft.fftfreq(size).square()
        square = square + line.reshape([-1 if k == axis else 1 for k in range(len(sizes))])
    amplitude = square.sqrt().clamp_min(1 / max(sizes)).reciprocal().to(white.device)
    mixing = torch.linalg.cholesky(
        CORRELATION * torch.ones(channels, channels) + (1 - CORRELATION) * torch.eye(channels)
    )
    mixed = torch.einsum("cd,nd...->nc...", mixing.to(white), white)
    return torch.fft.ifftn(torch.fft.fftn(mixed, dim=axes) * amplitude, dim=axes).real


def advice(model: nn.Module, example_inputs: Inputs) -> tuple[str, str]:
    """Which calibration a network is best given when its user has no inputs, "synthetic" or "none", and why."""
    norms, shape = _norms(model), input_shape(example_inputs)
    tokens = tokens_of(model, example_inputs) if shape is None else None
    if tokens and writes(model, example_of(example_inputs, tokens[0])):
        return "synthetic", "tokens that it writes itself; a few real inputs are better"
    if tokens:
        return "synthetic", f"random tokens of its vocabulary of {tokens[1]:,}; a few real inputs are better"
    if shape is None:
        return "none", "its inputs are neither one tensor of numbers nor tokens; give a few unlabelled ones"
    if norms:
        return "synthetic", f"its {len(norms)} batch norms hold the statistics that inputs are matched to"
    if len(shape) < 2:
        return "none", "it has no batch norms that inputs could be matched to; give a few unlabelled inputs"
    return (
        "synthetic",
        "noise with the spectrum of images, as it has no batch norms that inputs could be matched to",
    )


def input_shape(example_inputs: Inputs) -> tuple[int, ...] | None:
    """The shape of one input where example inputs are a batch in one tensor of numbers, and None where not."""
    args, kwargs = arguments_of(example_inputs)
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return None
    return tuple(args[0].shape[1:])


def synthetic_like(
    model: nn.Module, example_inputs: Inputs, count: int | None = None, *, seed: int = 0, progress: Progress = silent
) -> Sequence[Inputs]:
    """Batches of synthetic inputs of the kind of the example inputs; by default as many as their size calls for.

    Raises DataError where these are neither one tensor of numbers nor tokens.
    """
    shape = input_shape(example_inputs)
    if shape is not None:
        args, kwargs = arguments_of(example_inputs)
        (example,) = (*args, *kwargs.values())
        batch = _batch_size(model, len(example), lambda rows: torch.cat([example] * (rows // len(example))))
        half = _half(model, shape) if batch == BATCH else None
        count = count or (max(SMALLER, usual_count(half)) if half else usual_count(shape))
        return synthetic_inputs(model, half or shape, count, seed=seed, batch_size=batch, progress=progress)
    tokens = tokens_of(model, example_inputs)
    if tokens is None:
        raise DataError(
            f"synthetic inputs are made for one tensor of numbers, or tokens, not {describe_inputs(example_inputs)}; "
            "give a few unlabelled inputs as calibration"
        )
    place, vocabulary = tokens
    example = example_of(example_inputs, place)

    def repeated(rows: int) -> Inputs:
        return batches_like(example_inputs, place, random_rows(example, vocabulary, rows), rows)[0]

    batch = _batch_size(model, len(example), repeated)
    count = count or max(FEWEST, min(SAMPLES, TOKENS // max(example[0].numel(), 1)))
    if batch != BATCH:  # the network takes batches of this size alone
        count = math.ceil(count / batch) * batch
    if writes(model, example):
        drawn = written_rows(model, example, vocabulary, count, seed=seed, progress=progress)
    else:
        drawn = random_rows(example, vocabulary, count, seed=seed)
    return batches_like(example_inputs, place, drawn, batch)


def _half(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Images of half the size, where these are large, and there are batch norms that tell what they should be like.

    Four of them have as many patches as one, and more that differ. They will do where all that has places in the
    network has fewer for them: not behind a pooling to 7×7, or where positions have embeddings.
    """
    if len(shape) != 3 or min(shape[1:]) < LARGE or not _norms(model):
        return None
    half = (shape[0], *(side // 2 for side in shape[1:]))
    try:
        whole, small = (_places(model, one) for one in (shape, half))
    except Exception:  # what a network does with inputs of another size is its own
        return None
    return half if whole and all(small.get(name, size) < size for name, size in whole.items()) else None


def _places(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """How many places the outputs of the modules without parts have for an input, where they have several."""
    found: dict[str, int] = {}

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim > 2 and (places := math.prod(output.shape[2:])) > 1:
                found[name] = places

        return note

    leaves = {name: module for name, module in model.named_modules() if not any(True for _ in module.children())}
    with attached(module.register_forward_hook(watch(name)) for name, module in leaves.items()):
        run(model, torch.zeros(1, *shape, dtype=next(p.dtype for p in model.parameters() if p.is_floating_point())))
    return found


def _batch_size(model: nn.Module, rows: int, repeated: Callable[[int], Inputs]) -> int:
    """`BATCH`, or the number of rows in the example where the network runs on no other number."""
    try:
        run(model, repeated(2 * rows))
    except Exception:
        return rows
    return BATCH


def usual_count(shape: tuple[int, ...]) -> int:
    """How many inputs of a shape are made by default: `SAMPLES`, fewer of large ones, which hold more positions."""
    return max(FEWEST, min(SAMPLES, POSITIONS // max(math.prod(shape[1:]), 1)))


def synthetic_inputs(
    model: nn.Module,
    shape: tuple[int, ...],
    count: int,
    *,
    seed: int = 0,
    steps: int | None = None,
    batch_size: int = BATCH,
    progress: Progress = silent,
) -> list[Tensor]:
    """Batches of synthetic inputs, matched to the statistics that the network's batch norms hold, if it has any.

    The same seed gives the same inputs. The model is left as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = (MORE_STEPS if usual_count(shape) == SAMPLES else STEPS) if steps is None else steps
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    if batch_size != BATCH:  # the network takes batches of this size alone
        sizes = [batch_size] * len(sizes)
    white = [torch.randn(size, *shape, generator=generator) for size in sizes]
    place = next(p for p in model.parameters() if p.is_floating_point())
    norms, made = _norms(model), []
    for number, noise in enumerate(white):
        scale = coloured(noise).std()
        if norms:
            report = partial(_report, progress, number * steps, steps * len(white))
            noise = _matched(model, norms, noise.to(place.device), scale, steps, report)
        made.append((coloured(noise) / scale).to(place.device, place.dtype))
    return made


def _matched(
    model: nn.Module, norms: list[nn.Module], white: Tensor, scale: Tensor, steps: int, report: Callable[[int], None]
) -> Tensor:
    """The white noise after gradient descent on how far the inputs made of it are from what the batch norms hold."""
    place = next(p for p in model.parameters() if p.is_floating_point())
    white = white.clone().requires_grad_()
    optimiser = torch.optim.Adam([white], lr=RATE, betas=(MOMENTUM, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    for step in range(steps):
        report(step)
        with evaluating(model), torch.enable_grad(), _statistics(norms) as found:
            model((coloured(white) / scale).to(place.dtype))
            (white.grad,) = torch.autograd.grad(torch.stack(found).mean(), [white])
        optimiser.step()
        schedule.step()
    report(steps)
    return white.detach()


def _report(progress: Progress, done: int, total: int, step: int) -> None:
    progress("making inputs", done + step, total)


def _norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms that hold statistics of training: not those that are as new, or folded into other layers."""
    return [module for module in model.modules() if holds_statistics(module) and not _is_standard(cast(Any, module))]


def _is_standard(norm: nn.BatchNorm2d) -> bool:
    """Whether a batch norm holds mean 0 and variance 1 for every channel, as a new one does."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    return bool(mean.abs().max() < 1e-3 and (variance - 1).abs().max() < 1e-3)


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

    with attached(norm.register_forward_pre_hook(compare) for norm in norms):
        yield found
