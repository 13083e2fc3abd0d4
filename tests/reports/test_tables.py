"""What people see: no name is cut in a terminal of any width, and nothing is where the output is no terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType
from rich.text import Text
from torch import nn

from rankfold import Analysis, Cost, LayerPlan, Plan, Result, analyze
from rankfold.decompositions.wiring import Call, LayerShape
from rankfold.plan import LayerSpec
from rankfold.reports import tables
from rankfold.reports.analysis import Saving
from rankfold.reports.layout import Listing, folded, grouped, show, shown_name

PARTS = ("self_attn.k_proj", "self_attn.out_proj", "encoder_attn.out_proj", "fc1", "fc2")
NAMES = [f"model.decoder.layers.{k}.{part}" for k in range(12) for part in PARTS]
DECOMPOSITIONS = ("svd", "spatial", "tucker", "tt", "cp", "cp3", "ring")
SKIPPED = {
    "model.decoder.embed_tokens": "Embedding is not a kind of layer that is decomposed",
    **{f"model.decoder.layers.{k}.self_attn.q_proj": "excluded" for k in range(12)},
    **{f"model.encoder.layers.{k}.self_attn.q_proj": "excluded" for k in (0, 1, 2, 5, 7)},
    "proj_out": "its weight is tied to model.decoder.embed_tokens (Embedding), which stays as it is",
}


def rendered(table: RenderableType, width: int) -> list[str]:
    """The lines of a table in a terminal of so many columns."""
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system=None).print(table)
    lines = file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert not any("…" in line for line in lines)
    return [line.rstrip() for line in lines]


def names_in(lines: list[str]) -> list[str]:
    """The first column, folded names put together again."""
    names: list[str] = []
    for line in lines:
        if line.startswith("  "):
            names[-1] += line.split()[0]
        elif line:
            names.append(line.split()[0])
    return names


@pytest.fixture
def analysis() -> Analysis:
    layers = []
    for name in NAMES:
        shape = LayerShape(768, 768, (), calls=(Call(10),))
        layer = LayerSpec(name, "Linear", shape, "float32", 4, (768, 768))
        layers.append((layer, {one: Saving(0.5, 0.58, (3,)) for one in DECOMPOSITIONS}))
    return Analysis(Cost(50_000_000, 600_000_000, 200_000_000), tuple(layers), SKIPPED)


@pytest.fixture
def result() -> Result:
    cost = Cost(768 * 768, 7680 * 768, 4 * 768 * 768)
    layers = tuple(LayerPlan(name, "Linear", (768, 768), "svd", (123,), cost, cost) for name in NAMES)
    settings = {"metric": "second moments", "calibration": "given inputs", "calibration_samples": 8}
    settings |= {"fitted": "in forward order", "frobenius_layers": NAMES}
    return Result(nn.Identity(), Plan(layers, SKIPPED, cost, cost, settings), 1.0)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
def test_every_name_can_be_read_in_full_in_a_terminal(width: int, analysis: Analysis, result: Result):
    for table in (tables.analysis(analysis), tables.compression(result, Path("out"))):
        lines = rendered(table, width)
        assert names_in(lines[1:])[: len(NAMES)] == NAMES
        assert ("a wider terminal or --json" in " ".join(" ".join(lines).split())) == ("kind" not in lines[0])


def test_decompositions_stay_in_80_columns(analysis: Analysis):
    lines = rendered(tables.analysis(analysis), 80)
    assert all(name in lines[0] for name in DECOMPOSITIONS)
    assert "58 %" in lines[1]
    assert "not in 80 columns: kind, weight, params; a wider terminal or --json has them" in "\n".join(lines)


def test_output_that_is_no_terminal_is_neither_wrapped_nor_cut(analysis: Analysis, result: Result, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    show(tables.analysis(analysis), tables.compression(result, Path("out")))
    lines = capsys.readouterr().out.split("\n")
    assert [line.split()[0] for line in lines[1 : len(NAMES) + 1]] == NAMES
    assert lines[0].split()[:5] == ["layer", "kind", "weight", "params", "MACs"]
    assert any(line.startswith("proj_out ") and line.endswith(SKIPPED["proj_out"]) for line in lines)
    assert not any(line != line.rstrip() or "wider terminal" in line or "…" in line for line in lines)
    assert lines.count("") == 2  # between the two, and at the end


def test_skipped_layers_are_grouped_and_a_reason_is_told_once():
    narrow = rendered(tables.skipped(SKIPPED), 80)
    assert narrow[3:5] == ["model.decoder.layers.*.self_attn.q_proj (12   excluded", "  layers: 0–11)"]
    lines = rendered(tables.skipped(SKIPPED), 200)
    assert " ".join(lines[1].split()) == f"model.decoder.embed_tokens {SKIPPED['model.decoder.embed_tokens']}"
    assert lines[2].startswith("model.decoder.layers.*.self_attn.q_proj (12 layers: 0–11)  ")
    assert lines[2].endswith("  excluded")
    assert lines[3].startswith("model.encoder.layers.*.self_attn.q_proj (5 layers: 0–2, 5, 7)  ")
    assert len(lines) == 5
    assert "".join(lines).count("excluded") == 1


def test_groups_say_exactly_which_names_they_are():
    assert grouped(NAMES[:2]) == NAMES[:2]
    assert grouped([]) == []
    assert grouped(["a.0.b", "a.1.b"]) == ["a.0.b", "a.1.b"]
    assert grouped(["a.0.b", "a.1.b", "a.3.b", "c"]) == ["a.*.b (3 layers: 0, 1, 3)", "c"]
    assert grouped(["0", "1", "2", "3"]) == ["* (4 layers: 0–3)"]
    two = [f"stages.{i}.blocks.{k}.fc" for i in range(2) for k in range(4 + 3 * i)]
    assert grouped(two) == ["stages.0.blocks.*.fc (4 layers: 0–3)", "stages.1.blocks.*.fc (7 layers: 0–6)"]
    assert grouped(["x.00", "x.01", "x.02"]) == ["x.00", "x.01", "x.02"]
    assert grouped([""]) == ["(the model itself)"]


@pytest.mark.parametrize("width", [1, 2, 5, 11, 30, 47])
def test_folded_names_are_whole(width: int):
    for name in (*NAMES[:5], "averyveryverylongnamewithoutanydots.x", "a.b"):
        lines = folded(Text(name), width).plain.split("\n")
        assert max(map(len, lines)) <= width
        assert "".join(line.strip() for line in lines) == name


def test_brackets_in_cells_are_no_markup():
    table = Listing("@layer", ">n")
    table.add_row("blocks[0].[bold]", "1")
    assert rendered(table, 80)[1] == "blocks[0].[bold]  1"


def test_the_model_itself_has_a_name_to_show():
    assert shown_name("") == "(the model itself)"
    report = analyze(nn.Linear(8, 8), torch.zeros(1, 8), decomposition="svd")
    assert "(the model itself)" in "\n".join(rendered(tables.analysis(report), 80))


def test_an_analysis_says_what_is_within_reach():
    model = nn.Sequential(nn.Embedding(10, 16, max_norm=1.0), nn.Linear(16, 16, bias=False), nn.Linear(16, 4))
    report = analyze(model, torch.zeros(1, 3, dtype=torch.long), decomposition="svd")
    assert report.within_reach == {"params": pytest.approx((256 + 64) / (160 + 256 + 68)), "macs": pytest.approx(1.0)}
    assert report.as_dict()["within_reach"] == report.within_reach
    told = "\n".join(rendered(tables.analysis(report), 100))
    assert "within reach: 66.1 % of the parameters and 100.0 % of the MACs, in 2 layers that can be decomposed" in told


def test_a_network_out_of_reach_is_analysed_all_the_same():
    report = analyze(nn.Sequential(nn.Embedding(10, 16, max_norm=1.0)), torch.zeros(1, 3, dtype=torch.long))
    assert report.layers == ()
    assert report.within_reach == {"params": 0.0, "macs": 0.0}
    told = "\n".join(rendered(tables.analysis(report), 100))
    assert "it renormalises the rows that it reads" in told
    assert "in 0 layers" in told


def test_what_became_of_refined_blocks_is_said() -> None:
    known = {"metric": "second moments", "calibration": "given inputs", "calibration_samples": 64, "fitted": "apart"}

    def said(blocks: dict[str, list[float]]) -> str:
        return tables.calibration({**known, "refined_blocks": blocks}).partition("fitted apart")[2]

    assert said({"a": [0.4, 0.3], "b": [0.2, 0.2]}) == "; 1 of 2 blocks refined, their errors 25 % lower"
    assert said({"a": [0.4, 0.4]}) == "; no block gained by being refined"
    assert said({}) == "; not refined: too few inputs to hold some back"
    assert tables.calibration(known).endswith("fitted apart")
