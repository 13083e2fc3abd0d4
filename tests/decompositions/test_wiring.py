from __future__ import annotations

import numpy as np
import pytest

from rankfold.decompositions import DECOMPOSITIONS
from rankfold.decompositions.wiring import MATRIX, Call, LayerShape, Wiring

CONV = LayerShape(64, 32, (3, 3), calls=(Call(2, (16, 16), (8, 8)),))


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("svd", ("Aihw", "oA")),
        ("spatial", ("Aih", "owA")),
        ("tucker", ("Ai", "BAhw", "oB")),
        ("tt", ("Ai", "BAh", "CBw", "oC")),
        ("cp", ("Ai", "Ah", "Aw", "oA")),
        ("cp3", ("Ai", "Ahw", "oA")),
        ("ring", ("AiB", "BhC", "CwD", "DoA")),
    ],
)
def test_wirings_of_a_2d_convolution(name: str, factors: tuple[str, ...]):
    assert DECOMPOSITIONS[name].wiring("hw").factors == factors


def test_stages_of_cp_are_depthwise_and_those_of_a_ring_carry_a_bond():
    cp = DECOMPOSITIONS["cp"].wiring("hw").stages
    assert [stage.kept for stage in cp] == ["", "A", "A", ""]
    ring = DECOMPOSITIONS["ring"].wiring("hw").stages
    assert [stage.carried for stage in ring] == ["", "A", "A", ""]
    assert ring[-1].summed == "AD"


def test_costs_by_hand():
    tucker = DECOMPOSITIONS["tucker"].wiring("hw")
    assert tucker.params(CONV, (4, 5)) == 32 * 4 + 4 * 5 * 9 + 5 * 64
    assert tucker.macs(CONV, (4, 5)) == 2 * (256 * 32 * 4 + 64 * (4 * 5 * 9 + 5 * 64))
    assert CONV.macs == 2 * 64 * 64 * 32 * 9
    ring = DECOMPOSITIONS["ring"].wiring("hw")
    stages = 256 * 32 * 6 + 2 * 128 * 3 * 3 * 4 + 2 * 64 * 4 * 3 * 5 + 64 * 5 * 64 * 2
    assert ring.macs(CONV, (2, 3, 4, 5)) == 2 * stages


def test_costs_of_arrays_are_those_of_each_entry():
    wiring = DECOMPOSITIONS["tt"].wiring("hw")
    ranks = [np.array([1, 4, 9]), np.array([2, 3, 8]), np.array([5, 6, 7])]
    for k in range(3):
        one = [int(axis[k]) for axis in ranks]
        assert wiring.macs(CONV, ranks)[k] == wiring.macs(CONV, one)
        assert wiring.params(CONV, ranks)[k] == wiring.params(CONV, one)
        assert [largest[k] for largest in wiring.largest_ranks(CONV, ranks)] == wiring.largest_ranks(CONV, one)


def test_strides_without_taps_go_where_they_save_most():
    assert MATRIX.resized(LayerShape(8, 4, (1, 1))) == ("hw", "")
    assert MATRIX.resized(LayerShape(8, 4, (1, 1), transposed=True)) == ("", "hw")
    assert DECOMPOSITIONS["spatial"].wiring("hw").resized(CONV) == ("h", "w")


@pytest.mark.parametrize(
    ("factors", "problem"),
    [
        (("Ah", "oA"), "first factor must hold i"),
        (("Ai", "A"), "last factor must hold o"),
        (("Ai", "oB"), "one factor only"),
        (("Aih", "oAh"), "two factors"),
        (("AAi", "oA"), "twice"),
    ],
)
def test_letters_that_spell_no_network_are_refused(factors: tuple[str, ...], problem: str):
    with pytest.raises(ValueError, match=problem):
        Wiring(factors)
