"""Contractions over a wiring's letters, and alternating least squares on its factors.

Every wiring is linear in each of its factors, so one solver serves all: with the others fixed, the best factor solves
the normal equations F·Γ = R, where R is the weight contracted with the others and Γ their Gram matrix over the bonds
they share with F. Where the others fall into parts that share no bond (left and right of a train's factor), Γ is the
Kronecker product of the parts' Gram matrices, and is applied part by part. Kolda and Bader, SIAM Review 51 (2009),
sections 3.4 and 4.2; Kroonenberg and De Leeuw (1980) for the Tucker case.

Contractions go pair by pair, smallest result first, so that the Khatri-Rao product of all other factors, which is as
large as the weight times the rank, is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rankfold.decompositions.expansion import Factors
from rankfold.decompositions.wiring import TAPS, Wiring

LARGEST_DOUBLE = 2**20
"""Entries of a weight up to which it is multiplied by factors in float64, beyond in float32; solves are in float64."""
LARGEST_GRAM = 1536
"""Side of the largest Gram matrix that is solved with (19 MB); a factor with a larger one keeps its start."""

_RIDGE = 1e-12


def weight_axes(wiring: Wiring) -> str:
    """The letters of a weight that this wiring reproduces, in the order (o, i, taps)."""
    return "oi" + "".join(axis for axis in TAPS if any(axis in factor for factor in wiring.factors))


def reconstruct(wiring: Wiring, factors: Factors) -> Float[Tensor, "g o i *taps"]:
    """The weight that the factors stand for, in their dtype; differentiable in them."""
    return _contract(list(zip(wiring.factors, factors, strict=True)), weight_axes(wiring))


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
) -> Factors:
    """The factors after at most `sweeps` rounds of least squares over one factor at a time.

    With `damping` δ, which is for CP alone, δ Σ_r ‖term r‖² / ‖W‖² is part of the error, here and below.

    Each round starts from a point extrapolated along the last step, with Nesterov's growing weights, and falls back to
    the plain point when that made the error rise (Mitchell, Ye and De Sterck, arXiv 1810.05846). For CP on
    convolutions this takes a third to a quarter of the rounds. Stops when a round lowers the squared relative error by
    less than `tolerance` of itself. Never worse than the start.
    """
    total = float(weight.square().sum())
    if total == 0 or sweeps == 0:
        return factors
    previous = current = factors
    error, momentum = relative_error(weight, wiring, factors), 0
    if damping:
        error += damping * term_energy(wiring, factors) / total
    for _ in range(sweeps):
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
    return current


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
                gram = _gram(part, bonds, side)
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
        norms.append(torch.linalg.vector_norm(factor, dim=summed, keepdim=True).clamp_min(1e-150))
    flat = [norm.flatten(1) for norm in norms]  # (g, components): only the group and the common bonds are left
    mean = torch.stack([norm.log() for norm in flat]).mean(0).exp()
    return tuple(
        factor * (mean / own).reshape(norm.shape) for factor, norm, own in zip(factors, norms, flat, strict=True)
    )


def _sweep(weight: Tensor, wiring: Wiring, factors: list[Tensor], damping: float) -> tuple[Factors, float]:
    """Every factor solved for in turn, and the energy of the weight that the outcome explains."""
    explained = 0.0
    for position in range(len(factors)):
        solution, projection = _solve(weight, wiring, factors, position, damping)
        if solution is not None:
            factors[position], explained = solution, projection
    return tuple(factors), explained


def _solve(
    weight: Tensor, wiring: Wiring, factors: Sequence[Tensor], position: int, damping: float
) -> tuple[Tensor, float] | tuple[None, float]:
    """The best factor at `position` with the others fixed, and its inner product with the right-hand side.

    That product is the energy of the weight it explains, less the damping. None where a Gram matrix is too large.
    """
    letters = wiring.factors[position]
    others = [(wiring.factors[k], factor) for k, factor in enumerate(factors) if k != position]
    dtype = weight.dtype if weight.numel() <= LARGEST_DOUBLE else torch.float32
    network = [(axes, tensor.to(dtype)) for axes, tensor in [(weight_axes(wiring), weight), *others]]
    solution = right = _contract(network, letters).to(weight.dtype)
    for number, (part, bonds, side) in enumerate(_parts(letters, others, right)):
        if side > LARGEST_GRAM:
            return None, 0.0
        gram = _gram(part, bonds, side)
        if damping and number == 0:  # the diagonal of CP's: the energies of the terms, without this factor
            gram.diagonal(dim1=-2, dim2=-1).mul_(1 + damping)
        solution = _apply_inverse(gram, solution, letters, bonds)
    return solution, float((solution * right).sum())


def _parts(
    letters: str, others: Sequence[tuple[str, Tensor]], factor: Tensor
) -> Iterator[tuple[list[tuple[str, Tensor]], str, int]]:
    """The parts that the other factors fall into, the bonds that each shares with `factor`, and their joint size."""
    for part in _connected(others):
        joined = "".join(letter for letter, _ in part)
        bonds = "".join(bond for bond in letters if bond.isupper() and bond in joined)
        yield part, bonds, math.prod(factor.shape[1 + letters.index(bond)] for bond in bonds)


def _gram(part: Sequence[tuple[str, Tensor]], bonds: str, side: int) -> Float[Tensor, "g n n"]:
    """Gram matrix of a part of the network over its open `bonds`: the part contracted with itself."""
    gram = _contract(_doubled(part, ""), bonds + "".join(_prime(bond) for bond in bonds))
    return gram.reshape(len(gram), side, side)


def _trace(part: Sequence[tuple[str, Tensor]], bonds: str) -> Float[Tensor, " g"]:
    """The trace of that matrix, which is never formed."""
    return _contract(_doubled(part, bonds), "")


def _doubled(part: Sequence[tuple[str, Tensor]], joined: str) -> list[tuple[str, Tensor]]:
    """A part of the network, and itself again with other letters for its bonds, but for the `joined` ones."""
    apart = {letter: _prime(letter) for letters, _ in part for letter in letters if letter.isupper()}
    apart |= {letter: letter for letter in joined}
    return [*part, *(("".join(apart.get(letter, letter) for letter in letters), factor) for letters, factor in part)]


def _prime(bond: str) -> str:
    """Another letter for a bond."""
    return chr(ord(bond) + 0x100)


def _apply_inverse(
    gram: Tensor, right: Tensor, letters: str, bonds: str, *, ridge: float = _RIDGE, definite: bool = False
) -> Tensor:
    """`right` with the inverse of `gram`, to which a share of its mean diagonal is added, applied along `bonds`.

    Least squares takes over where the sum is not positive definite, unless it is said to be.
    """
    rest = "".join(letter for letter in letters if letter not in bonds)
    order = [1 + letters.index(letter) for letter in bonds + rest]
    moved = right.permute(0, *order)
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]
    columns = moved.reshape(*gram.shape[:2], -1)
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


def _contract(network: Sequence[tuple[str, Tensor]], result: str) -> Tensor:
    """The network of lettered tensors summed over every letter not in `result`, pair by pair.

    Every tensor has a leading group axis, which is kept.
    """
    nodes = list(network)
    for a, b, kept in _path(tuple(letters for letters, _ in nodes), tuple(t.shape[1:] for _, t in nodes), result):
        merged = _pair(nodes[a], nodes[b], kept)
        nodes = [node for k, node in enumerate(nodes) if k not in (a, b)] + [(kept, merged)]
    (letters, tensor) = nodes[0]
    return tensor.permute(0, *(1 + letters.index(letter) for letter in result))


@lru_cache(maxsize=4096)
def _path(
    network: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], result: str
) -> tuple[tuple[int, int, str], ...]:
    """Which two to contract, again and again, and the letters to keep: always the pair of the smallest result."""
    sizes = {
        letter: size
        for letters, shape in zip(network, shapes, strict=True)
        for letter, size in zip(letters, shape, strict=True)
    }
    left, path = list(network), []
    while len(left) > 1:
        choices = []
        for a in range(len(left)):
            for b in range(a + 1, len(left)):
                needed = result + "".join(letters for k, letters in enumerate(left) if k not in (a, b))
                kept = "".join(letter for letter in dict.fromkeys(left[a] + left[b]) if letter in needed)
                shares = any(letter in left[b] for letter in left[a])
                choices.append((not shares, math.prod(sizes[letter] for letter in kept), a, b, kept))
        _, _, a, b, kept = min(choices)
        left = [letters for k, letters in enumerate(left) if k not in (a, b)] + [kept]
        path.append((a, b, kept))
    return tuple(path)


def _pair(left: tuple[str, Tensor], right: tuple[str, Tensor], kept: str) -> Tensor:
    """Two lettered tensors contracted to the letters `kept`.

    Where one has all letters of the other, or nothing is summed, a broadcast product is much faster than the batched
    matrix products that einsum would make of the letters they share.
    """
    equation, views, summed = _pair_plan(left[0], right[0], kept)
    if equation:
        return torch.einsum(equation, left[1], right[1])
    first, second = (
        tensor.permute(axes)[index] for (_, tensor), (axes, index) in zip((left, right), views, strict=True)
    )
    product = first * second
    return product.flatten(1 + len(kept)).sum(-1) if summed else product


@lru_cache(maxsize=4096)
def _pair_plan(
    left: str, right: str, kept: str
) -> tuple[str, tuple[tuple[tuple[int, ...], tuple[slice | None, ...]], ...], bool]:
    """An einsum equation; or, empty, for each tensor the permutation and indexing that align it, and whether to sum."""
    union = "".join(dict.fromkeys(left + right))
    summed = "".join(letter for letter in union if letter not in kept)
    if summed and not (set(left) <= set(right) or set(right) <= set(left)):
        names = {letter: chr(ord("b") + k) for k, letter in enumerate(union)}
        first, second, output = ("a" + "".join(names[letter] for letter in axes) for axes in (left, right, kept))
        return f"{first},{second}->{output}", (), False
    order = kept + summed
    views = []
    for letters in (left, right):
        axes = (0, *(1 + letters.index(letter) for letter in order if letter in letters))
        views.append((axes, (slice(None), *(slice(None) if letter in letters else None for letter in order))))
    return "", tuple(views), bool(summed)
