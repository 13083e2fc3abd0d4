"""Interpolative: some of a layer's inputs are kept, and its weight rebuilds the others from them.

With Σ the second moment of the inputs h and S those that are kept, the best rebuilding is their regression on h_S, and
the layer's weight becomes W Σ_{·S} Σ_SS⁻¹ (an interpolative decomposition: Cheng, Gimbutas, Martinsson and Rokhlin,
SIAM J. Sci. Comput. 26 (2005) 1389; of networks Chee et al., arXiv 2108.00065). What to keep is found by taking inputs
away: with H = Σ_SS⁻¹ and W the weight at hand, leaving out q costs tr W_q (H_qq)⁻¹ W_qᵀ of the output (Hassibi and
Stork's optimal brain surgeon, NIPS 1992, for columns), and one pass orders all inputs and gives the error of every
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from rankfold.decompositions.metric import Moment

RIDGE = 1e-6
"""Share of the mean square that is added to a moment, so that inputs that are sums of others can be told apart."""
WORK = 2**18
"""Channels times size of the moment up to which channels go one by one; beyond, several at once in proportion."""
FEWEST_STEPS = 64
"""Steps of an elimination at least, where there are as many channels."""
COMPACT = 0.75
"""Part of the inverse that is still in use, below which the rest is let go."""
APART = 1e-3
"""Part of every input's mean square that no inputs before it tell, from which on a moment in float32 is inverted in it.

Orders and errors are the same (ResNet-50's `layer4`, six digits), in half the time.
"""


@dataclass(frozen=True)
class Elimination:
    """The channels of every part in the order in which they go, and what is lost with them.

    `order` has a row per part; `errors[k]` is the squared relative error of the output once the first k of every row
    are gone.
    """

    order: npt.NDArray[np.int64]
    errors: npt.NDArray[np.float64]

    def kept(self, width: int) -> tuple[int, ...]:
        """The channels that are left at a width, the same number of every part, in rising order."""
        parts, run = self.order.shape
        left = self.order[:, run - width // parts :]
        return tuple(sorted((left + run * np.arange(parts)[:, None]).ravel().tolist()))

    def error(self, width: int) -> float:
        """The error at a width."""
        parts, run = self.order.shape
        return float(self.errors[run - width // parts])


def eliminate(weight: Float[Tensor, "g o i *taps"], moment: Moment, channels: int, parts: int) -> Elimination:
    """The order in which a layer's input channels go, with the error of its output.

    Neighbouring inputs belong to one channel where there are more inputs than channels. Every one of `parts` runs of
    channels loses as many; groups of the layer lie in parts, or parts in groups. Where nothing is known of the inputs,
    or nothing ever came in, all count alike.
    """
    flat, square = moment.counted(weight.double()).flatten(2), whole(moment, weight)
    groups = len(flat)
    total = float(((flat @ square) * flat).sum())
    if groups >= parts:  # parts are made of whole groups or are groups; others would need a common order
        parts = groups
    run, block = channels // parts, flat.shape[2] * groups // channels
    within = parts // groups
    inverse = _inverse(square, torch.float64 if moment.joint is None else moment.joint.dtype)
    orders = np.zeros((parts, run), dtype=np.int64)
    lost = np.zeros(run + 1)
    for group in range(groups):
        order, errors = _eliminated(flat[group].to(inverse), inverse[group], within, run, block)
        orders[group * within : (group + 1) * within] = order
        lost += errors
    lost[-1] = total
    errors = np.minimum(np.maximum.accumulate(lost / total), 1.0) if total > 0 else np.zeros(run + 1)
    return Elimination(orders, errors)


def interpolated(
    weight: Float[Tensor, "g o i *taps"], moment: Moment, columns: Tensor
) -> Float64[Tensor, "g o kept *taps"]:
    """The weight on the kept inputs alone, in which the others are rebuilt from them.

    `columns` are the inputs that are kept, of all groups together, as many of each.
    """
    groups, outputs, inputs = weight.shape[:3]
    taps = weight[0, 0, 0].numel()
    flat, square = weight.double().flatten(2), whole(moment, weight)
    split = by_group(columns, groups, inputs)
    found = []
    for group, kept in enumerate(split):
        places = entries(kept, taps)
        seen = square[group][:, places]
        found.append(_solved(seen[places], (flat[group] @ seen).mT).mT)
    return torch.stack(found).reshape(groups, outputs, split.shape[1], *weight.shape[3:])


def interpolation_error(weight: Float[Tensor, "g o i *taps"], moment: Moment, columns: Tensor) -> float:
    """The squared relative error of a layer's output once only some inputs are kept, and the weight is rebuilt."""
    residual = weight.double() - padded(interpolated(weight, moment, columns), weight.shape[2], columns)
    square = whole(moment, weight)
    flat, residual = (moment.counted(one).flatten(2) for one in (weight.double(), residual))
    energy = float(((flat @ square) * flat).sum())
    return float(((residual @ square) * residual).sum()) / energy if energy > 0 else 0.0


def padded(weight: Float[Tensor, "g o kept *taps"], inputs: int, columns: Tensor) -> Float[Tensor, "g o i *taps"]:
    """A weight on some inputs as one on all, zero on the others."""
    found = weight.new_zeros(*weight.shape[:2], inputs, *weight.shape[3:])
    for group, kept in enumerate(by_group(columns, len(weight), inputs)):
        found[group].index_copy_(1, kept.to(weight.device), weight[group])
    return found


def by_group(places: Tensor, groups: int, size: int) -> Int64[Tensor, "g kept"]:
    """Places among the inputs or outputs of all groups as those within every group, as many of each."""
    return places.reshape(groups, -1) - torch.arange(groups)[:, None] * size


def entries(channels: Sequence[int] | Tensor, inner: int) -> Int64[Tensor, " inputs"]:
    """The inputs that belong to some channels, `inner` neighbours to each."""
    found = torch.as_tensor(channels).flatten()
    return (found[:, None] * inner + torch.arange(inner, device=found.device)).flatten()


def whole(moment: Moment, weight: Float[Tensor, "g o i *taps"]) -> Float64[Tensor, "g n n"]:
    """A moment as matrices that can be inverted; the identity where nothing is known of the inputs."""
    square = moment.joint
    if square is None:
        size = weight[0, 0].numel()
        identity = torch.eye(size, dtype=torch.float64, device=weight.device).expand(len(weight), size, size)
        unfolded = identity.reshape(len(weight), size, *weight.shape[2:])
        square = replace(moment, outputs=None).applied(unfolded).reshape(identity.shape)
    square = square.to(weight.device, torch.float64, copy=True)
    mean = square.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    square.diagonal(dim1=-2, dim2=-1).add_(torch.where(mean > 0, RIDGE * mean, 1.0))
    return square


def _solved(square: Float64[Tensor, "n n"], right: Float64[Tensor, "n m"]) -> Float64[Tensor, "n m"]:
    """The inverse of a symmetric matrix times another; where it is definite, by Cholesky's factor."""
    triangle, failed = torch.linalg.cholesky_ex(square)
    return torch.linalg.solve(square, right) if failed else torch.cholesky_solve(right, triangle)


def _inverse(square: Float64[Tensor, "g n n"], dtype: torch.dtype) -> Float[Tensor, "g n n"]:
    """The inverse of symmetric matrices; where they are definite, as moments are but for rounding, by Cholesky's.

    In a `dtype` less than float64 where no input is nearly a sum of others (`APART`).
    """
    if dtype != square.dtype:
        triangle, failed = torch.linalg.cholesky_ex(square.to(dtype))
        apart = triangle.diagonal(dim1=-2, dim2=-1).square() / square.diagonal(dim1=-2, dim2=-1)
        if not failed.any() and apart.min() > APART:
            return torch.cholesky_inverse(triangle)
    triangle, failed = torch.linalg.cholesky_ex(square)
    if not failed.any():
        return torch.cholesky_inverse(triangle)
    inverse = torch.linalg.inv(square)
    return (inverse + inverse.mT) / 2


def _eliminated(
    weight: Tensor, inverse: Tensor, parts: int, run: int, block: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Orders (parts, run) within one group, and what is lost with the first k of every part."""
    device = weight.device
    alive = torch.arange(parts * run, device=device).reshape(parts, run)
    places = alive  # of those channels in what is left of the inverse
    orders: list[Tensor] = []
    lost = [0.0]
    step = max(1, min(round(run * len(inverse) / WORK), run // FEWEST_STEPS))
    while (left := alive.shape[1]) > 1:
        if parts * left * block < COMPACT * len(inverse):
            stay = entries(places, block)
            weight, inverse = weight[:, stay], inverse[stay][:, stay]
            places = torch.arange(parts * left, device=device).reshape(parts, left)
        size = min(step, left - 1)
        costs = _costs(weight, inverse, places.flatten(), block).reshape(parts, left)
        going = costs.topk(size, dim=1, largest=False, sorted=True).indices
        orders.append(alive.gather(1, going))
        go = entries(places.gather(1, going), block)
        rows, gone = inverse[go], weight[:, go]
        triangle = torch.linalg.lu_factor(rows[:, go])
        price = float((torch.linalg.lu_solve(*triangle, gone.mT) * gone.mT).sum())
        lost += [lost[-1] + price * (k + 1) / size for k in range(size)]
        gain = torch.linalg.lu_solve(*triangle, rows)
        weight = weight.addmm(gone, gain, alpha=-1)
        inverse.addmm_(rows.mT, gain, alpha=-1)  # what is gone is left as zeros
        mask = torch.ones(parts, left, dtype=torch.bool, device=device).scatter_(1, going, False)
        alive, places = (one[mask].reshape(parts, left - size) for one in (alive, places))
    orders.append(alive)
    within = torch.cat(orders, 1).cpu() - torch.arange(parts)[:, None] * run
    return within.numpy(), np.array([*lost, lost[-1]])


def _costs(weight: Tensor, inverse: Tensor, places: Tensor, block: int) -> Tensor:
    """What leaving out each of some channels costs, tr W_q (H_qq)⁻¹ W_qᵀ."""
    if block == 1:
        return weight.square().sum(0)[places] / inverse.diagonal()[places]
    count = len(inverse) // block
    blocks = torch.diagonal(inverse.reshape(count, block, count, block), dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.reshape(-1, count, block)[:, places].movedim(0, 1)
    return ((columns @ torch.linalg.inv(blocks[places])) * columns).sum((1, 2))
