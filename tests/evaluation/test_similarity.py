"""Pairs of sentences: how they are read, and how a model's similarities agree with their scores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from rankfold import DataError
from rankfold.evaluation import similarity
from rankfold.evaluation.similarity import embeddings
from rankfold.sources.pairs import open_pairs


class Bag(nn.Module):
    """States of tokens: their rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids)


def test_an_embedding_is_the_mean_over_the_tokens_whatever_the_order_of_lengths() -> None:
    model, sentences = Bag(), [[1, 2, 3], [4], [5, 6, 7], [8, 9]]
    found = embeddings(model, sentences)
    for row, tokens in zip(found, sentences, strict=True):
        torch.testing.assert_close(row, model.table.weight[tokens].mean(0))


def test_scores_that_are_the_models_own_agree_wholly_and_turned_round_not_at_all() -> None:
    model = Bag()
    first, second = [[k, k + 1] for k in range(20)], [[k + 7, k + 9, k + 3] for k in range(20)]
    cosines = functional.cosine_similarity(embeddings(model, first), embeddings(model, second)).tolist()
    assert similarity(model, first, second, [math.exp(one) for one in cosines]).spearman == pytest.approx(100)
    assert similarity(model, first, second, [-one for one in cosines]).spearman == pytest.approx(-100)
    with pytest.raises(DataError, match="all the same: there is no correlation"):
        similarity(model, first, second, [1.0] * 20)
    with pytest.raises(DataError, match="a sentence has no tokens"):
        similarity(model, [[], *first[1:]], second, [float(k) for k in range(20)])


@pytest.mark.parametrize("heading", ["", "first,second,score\n"])
def test_pairs_are_read_with_a_heading_or_without(heading: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(f'{heading}a b,"c, d",4.5\ne,f,0\n\ng,h,1e0\n', encoding="utf-8")
    found = open_pairs(f"pairs:{path}")
    assert (found.first, found.second, found.scores) == (("a b", "e", "g"), ("c, d", "f", "h"), (4.5, 0.0, 1.0))


def test_tabs_are_read_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text('\ufeffa "b\tc, d\t4\ne\tf" g\t0\nh\ti\t1\n', encoding="utf-8")
    assert open_pairs(f"pairs:{path}").first == ('a "b', "e", "h")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"\xff\xfe", "UTF-8"),
        (b"a,b,1\nc,d\ne,f,2\ng,h,3\n", r"row 2: it has 2 fields; a row is a sentence"),
        (b"a,b,1\nc,d,high\ne,f,2\ng,h,3\n", r"row 2: its score is 'high'"),
        (b"a,b\nc,d,1\ne,f,2\ng,h,3\n", r"row 1: it has 2 fields"),
        (b"a,b,1\nc,d,2\n", "holds 2 pairs of sentences; a correlation needs at least 3"),
    ],
)
def test_tables_that_are_no_pairs(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        open_pairs(f"pairs:{path}")
