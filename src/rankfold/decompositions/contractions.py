"""Contractions over a wiring's letters.

They go pair by pair, smallest result first, so that the Khatri-Rao product of all factors but one, which is as large as
the weight times the rank, is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from rankfold.decompositions.expansion import Factors
from rankfold.decompositions.wiring import TAPS, Wiring


def weight_axes(wiring: Wiring) -> str:
    """The letters of a weight that this wiring reproduces, in the order (o, i, taps)."""
    return "oi" + "".join(axis for axis in TAPS if any(axis in factor for factor in wiring.factors))


def reconstruct(wiring: Wiring, factors: Factors) -> Float[Tensor, "g o i *taps"]:
    """The weight that the factors stand for, in their dtype; differentiable in them."""
    return contract(list(zip(wiring.factors, factors, strict=True)), weight_axes(wiring))


def is_polyadic(wiring: Wiring) -> bool:
    """Whether the wiring is a sum of rank-one terms of three axes or more: one bond, which every factor carries."""
    return len(wiring.factors) > 2 and len(wiring.bonds) == 1 and all(wiring.bonds[0] in one for one in wiring.factors)


def contract(network: Sequence[tuple[str, Tensor]], result: str) -> Tensor:
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
