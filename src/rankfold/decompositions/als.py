"""Alternating least squares on the factors of any wiring.

Every wiring is linear in each of its factors, so one solver serves all: with the others fixed, the best factor solves
the normal equations F·Γ = R, where R is the weight contracted with the others and Γ their Gram matrix over the bonds
they share with F. Where the others fall into parts that share no bond (left and right of a train's factor), Γ is the
Kronecker product of the parts' Gram matrices, and is applied part by part. Kolda and Bader, SIAM Review 51 (2009),
sections 3.4 and 4.2; Kroonenberg and De Leeuw (1980) for the Tucker case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rankfold.decompositions.contractions import contract, is_polyadic, reconstruct, weight_axes
from rankfold.decompositions.expansion import Factors
from rankfold.decompositions.wiring import Wiring

LARGEST_DOUBLE = 2**15
"""Entries of a weight up to which its factors are found in float64, beyond in float32: the errors are the same."""
WORK = 2**30
"""MACs of the weight times a factor up to which all rounds are made, beyond in inverse proportion fewer."""
WORK_TO_MEASURE = 2**28
"""The same where all that is asked for is the error, about."""
FEWEST = 4
"""Rounds at least."""
LARGEST_GRAM = 1536
"""Side of the largest Gram matrix that is solved with (19 MB); a factor with a larger one keeps its start."""

_RIDGES = {torch.float64: 1e-12, torch.float32: 1e-6}


def relative_error(weight: Float64[Tensor, "g o i *taps"], wiring: Wiring, factors: Factors) -> float:
    """Squared relative Frobenius error, ‖W − Ŵ‖² / ‖W‖²; zero for a weight that is zero and reproduced."""
    residual = float((weight - reconstruct(wiring, factors)).square().sum())
    return residual / max(float(weight.square().sum()), 1e-300) if residual else 0.0


def alternate(
    weight: Float64[Tensor, "g o i *taps"],
    wiring: Wiring,
    factors: Factors,
    *,
    sweeps: int,
    tolerance: float = 1e-3,
    damping: float = 0.0,
    work: int = WORK,
) -> Factors:
    """The factors after at most `sweeps` rounds of least squares over one factor at a time.

    With `damping` δ, which is for CP alone, δ Σ_r ‖term r‖² / ‖W‖² is part of the error, here and below.

    Each round starts from a point extrapolated along the last step, with Nesterov's growing weights, and falls back to
    the plain point when that made the error rise (Mitchell, Ye and De Sterck, arXiv 1810.05846). For CP on
    convolutions this takes a third to a quarter of the rounds. Stops when a round lowers the squared relative error by
    less than `tolerance` of itself; of large weights there are fewer (`work`). Never worse than the start.
    """
    total = float(weight.square().sum())
    if total == 0 or sweeps == 0:
        return factors
    wide, weight = weight.dtype, weight if weight.numel() <= LARGEST_DOUBLE else weight.float()
    previous = current = factors = tuple(factor.to(weight) for factor in factors)
    error, momentum = relative_error(weight, wiring, factors), 0
    if damping:
        error += damping * term_energy(wiring, factors) / total
    macs = weight.numel() * factors[-1][0].numel() // weight.shape[1]
    for _ in range(max(min(sweeps, FEWEST), min(sweeps, sweeps * work // macs))):
        step = max(momentum - 1, 0) / (momentum + 2)
        start = [now + step * (now - before) for now, before in zip(current, previous, strict=True)]
        found, explained = _sweep(weight, wiring, start if step else list(current), damping)
        lower = max(1.0 - explained / total, 0.0)
        if not (math.isfinite(lower) and lower < error):
            if not step:
                break
            momentum = 0
            continue
        gain, error, momentum = error - lower, lower, momentum + 1
        previous, current = current, balance(wiring, found)
        if gain < tolerance * error:
            break
    return tuple(factor.to(wide) for factor in current)


def term_energy(wiring: Wiring, factors: Factors) -> float:
    """Σ_r ‖term r‖², the energies of the rank-one terms of a CP added up."""
    norms = [
        torch.linalg.vector_norm(factor.movedim(1 + letters.index(wiring.bonds[0]), 1).flatten(2), dim=-1)
        for letters, factor in zip(wiring.factors, factors, strict=True)
    ]
    return float(torch.stack(norms).prod(0).square().sum())


def scaled_gradients(wiring: Wiring, factors: Factors, gradients: Sequence[Tensor], ridge: float) -> Factors:
    """The gradient by every factor times the inverse Gram matrix of the others: steps of the weight, by each of them.

    A step along a factor's own gradient moves the weight by Γ, the Gram matrix of the others, times as much: far in
    some directions and hardly in others. Divided by Γ it is the weight's gradient, projected on what the factor can
    change, whatever the scale and the condition of the factors. Tong, Ma and Chi, arXiv 2005.08898, for matrices, Tong
    et al., arXiv 2104.14526, for Tucker; here for every wiring, since all are linear in each factor. `ridge` is added
    to Γ as a share of its mean diagonal; of a Γ with a side above `LARGEST_GRAM` only that mean is used. All factors
    together move the weight by the sum of their projections. In the factors' dtype; what is not finite stays so.
    """
    found = []
    for position, gradient in enumerate(gradients):
        others = [(wiring.factors[k], factor) for k, factor in enumerate(factors) if k != position]
        letters = wiring.factors[position]
        for part, bonds, side in _parts(letters, others, gradient):
            if side > LARGEST_GRAM:
                mean = (_trace(part, bonds) / side).clamp_min(torch.finfo(gradient.dtype).tiny)
                gradient = gradient / mean.reshape(-1, *[1] * (gradient.ndim - 1)) / (1 + ridge)
            else:
                gram = _gram(part, bonds)
                gradient = _apply_inverse(gram, gradient, letters, bonds, ridge=ridge, definite=True)
        found.append(gradient)
    return tuple(found)


def balance(wiring: Wiring, factors: Factors) -> Factors:
    """The same weight with its scale shared out evenly, so that no factor overflows a narrow dtype.

    A bond that every factor carries (as in CP) is balanced component by component, others as a whole.
    """
    common = [bond for bond in wiring.bonds if all(bond in factor for factor in wiring.factors)]
    norms = []
    for letters, factor in zip(wiring.factors, factors, strict=True):
        summed = [1 + axis for axis, letter in enumerate(letters) if letter not in common]
        norms.append(torch.linalg.vector_norm(factor, dim=summed, keepdim=True).clamp_min(1e-38))
    flat = [norm.flatten(1) for norm in norms]  # (g, components): only the group and the common bonds are left
    mean = torch.stack([norm.log() for norm in flat]).mean(0).exp()
    return tuple(
        factor * (mean / own).reshape(norm.shape) for factor, norm, own in zip(factors, norms, flat, strict=True)
    )


def _sweep(weight: Tensor, wiring: Wiring, factors: list[Tensor], damping: float) -> tuple[Factors, float]:
    """Every factor solved for in turn, and the energy of the weight that the outcome explains."""
    if is_polyadic(wiring):
        return _polyadic_sweep(weight, wiring, factors, damping)
    explained = 0.0
    for position in range(len(factors)):
        solution, projection = _solve(weight, wiring, factors, position)
        if solution is not None:
            factors[position], explained = solution, projection
    return tuple(factors), explained


def _polyadic_sweep(weight: Tensor, wiring: Wiring, factors: list[Tensor], damping: float) -> tuple[Factors, float]:
    """A sweep over a CP, in which what its factors have in common is computed once.

    The Gram matrix of the others is the product of their own, entry by entry, and the weight contracted with the last
    factor, which takes most of the work, serves all before it (Phan, Tichavský and Cichocki, arXiv 1204.1586).
    """
    bond, spelled, whole = wiring.bonds[0], wiring.factors, (weight_axes(wiring), weight)
    if factors[0].shape[1 + spelled[0].index(bond)] > LARGEST_GRAM:
        return tuple(factors), 0.0
    nodes = list(zip(spelled, factors, strict=True))
    last, explained = len(factors) - 1, 0.0
    grams = {position: _gram([nodes[position]], bond) for position in range(1, last + 1)}
    axes = whole[0].replace("o", "") + spelled[last].replace("o", "")
    head = (axes, contract([whole, nodes[last]], axes))
    for position, letters in enumerate(spelled):
        others = [head, *nodes[:last]] if position < last else [whole, *nodes]
        right = contract([one for one in others if one[0] != letters], letters)
        gram = torch.stack([grams[k] for k in range(last + 1) if k != position]).prod(0)
        gram.diagonal(dim1=-2, dim2=-1).mul_(1 + damping)  # the energies of the terms, without this factor
        factors[position] = _apply_inverse(gram, right, letters, bond)
        explained = float((factors[position] * right).sum())
        nodes[position] = (letters, factors[position])
        if position < last:
            grams[position] = _gram([nodes[position]], bond)
    return tuple(factors), explained


def _solve(
    weight: Tensor, wiring: Wiring, factors: Sequence[Tensor], position: int
) -> tuple[Tensor, float] | tuple[None, float]:
    """The best factor at `position` with the others fixed, and its inner product with the right-hand side.

    That product is the energy of the weight it explains. None where a Gram matrix is too large.
    """
    letters = wiring.factors[position]
    others = [(wiring.factors[k], factor) for k, factor in enumerate(factors) if k != position]
    solution = right = contract([(weight_axes(wiring), weight), *others], letters)
    for part, bonds, side in _parts(letters, others, right):
        if side > LARGEST_GRAM:
            return None, 0.0
        solution = _apply_inverse(_gram(part, bonds), solution, letters, bonds)
    return solution, float((solution * right).sum())


def _parts(
    letters: str, others: Sequence[tuple[str, Tensor]], factor: Tensor
) -> Iterator[tuple[list[tuple[str, Tensor]], str, int]]:
    """The parts that the other factors fall into, the bonds that each shares with `factor`, and their joint size."""
    for part in _connected(others):
        joined = "".join(letter for letter, _ in part)
        bonds = "".join(bond for bond in letters if bond.isupper() and bond in joined)
        yield part, bonds, math.prod(factor.shape[1 + letters.index(bond)] for bond in bonds)


def _gram(part: Sequence[tuple[str, Tensor]], bonds: str) -> Float[Tensor, "g n n"]:
    """Gram matrix of a part of the network over its open `bonds`: the part contracted with itself."""
    gram = contract(_doubled(part, ""), bonds + "".join(_prime(bond) for bond in bonds))
    side = math.prod(gram.shape[1 : 1 + len(bonds)])
    return gram.reshape(len(gram), side, side)


def _trace(part: Sequence[tuple[str, Tensor]], bonds: str) -> Float[Tensor, " g"]:
    """The trace of that matrix, which is never formed."""
    return contract(_doubled(part, bonds), "")


def _doubled(part: Sequence[tuple[str, Tensor]], joined: str) -> list[tuple[str, Tensor]]:
    """A part of the network, and itself again with other letters for its bonds, but for the `joined` ones."""
    apart = {letter: _prime(letter) for letters, _ in part for letter in letters if letter.isupper()}
    apart |= {letter: letter for letter in joined}
    return [*part, *(("".join(apart.get(letter, letter) for letter in letters), factor) for letters, factor in part)]


def _prime(bond: str) -> str:
    """Another letter for a bond."""
    return chr(ord(bond) + 0x100)


def _apply_inverse(
    gram: Tensor, right: Tensor, letters: str, bonds: str, *, ridge: float | None = None, definite: bool = False
) -> Tensor:
    """`right` with the inverse of `gram`, to which a share of its mean diagonal is added, applied along `bonds`.

    Least squares takes over where the sum is not positive definite, unless it is said to be.
    """
    rest = "".join(letter for letter in letters if letter not in bonds)
    order = [1 + letters.index(letter) for letter in bonds + rest]
    moved = right.permute(0, *order)
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]
    columns = moved.reshape(*gram.shape[:2], -1)
    ridge = _RIDGES[gram.dtype] if ridge is None else ridge
    added = ridge * scale * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    triangle, failed = torch.linalg.cholesky_ex(gram + added)
    if not definite and failed.any():
        solved = torch.linalg.lstsq(gram, columns, driver="gelsd" if gram.device.type == "cpu" else None).solution
    else:
        solved = torch.cholesky_solve(columns, triangle)
    inverse = [order.index(axis) + 1 for axis in range(1, len(order) + 1)]
    return solved.reshape(moved.shape).permute(0, *inverse)


def _connected(network: Sequence[tuple[str, Tensor]]) -> list[list[tuple[str, Tensor]]]:
    """The parts of a network that hang together by bonds of more than one component."""
    parts: list[list[tuple[str, Tensor]]] = []
    for node in network:
        bonds = {
            letter for letter, size in zip(node[0], node[1].shape[1:], strict=True) if letter.isupper() and size > 1
        }
        touching = [part for part in parts if any(bonds & set(letters) for letters, _ in part)]
        parts = [part for part in parts if part not in touching]
        parts.append([member for part in touching for member in part] + [node])
    return parts
