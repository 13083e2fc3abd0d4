"""The page: everything that was done is on it, it is sound HTML, and it needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image
from torch import nn

from rankfold import ArtifactError, Budget, Result, compress, save
from rankfold.calibration.pictured import pictures
from rankfold.files.artifact import save_evaluation
from rankfold.reports.page import write_page
from rankfold.reports.page.pictures import Axis, lines, number, thinned
from rankfold.search import Rene

VOID = {"meta", "link", "br", "img", "input", "hr", "path", "circle"}


class Reader(HTMLParser):
    """Checks that elements are closed in order; keeps the text, the sections, and what is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.sections: list[str] = []
        self.fetched: list[str] = []
        self.unnamed = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(given.get("id") or "")
        self.fetched += [
            value
            for name, value in given.items()
            if name in ("src", "href", "srcset") and value and not value.startswith("data:")
        ]
        self.unnamed += given.get("role") == "img" and not given.get("aria-label")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> tuple[Reader, str]:
    reader = Reader()
    content = path.read_text(encoding="utf-8")
    reader.feed(content)
    assert reader.open == []
    assert reader.fetched == []
    assert reader.unnamed == 0
    assert "<script" not in content
    return reader, " ".join(" ".join(reader.text).split())


@pytest.fixture(scope="module")
def result() -> Result:
    batches = [torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    options = {
        "decomposition": ["spatial", "interpolative"],
        "budget": Budget(macs=0.4),
        "calibration": batches,
        "refine": 1,
    }
    return compress(networks.small_cnn(), batches[0][:1], **options)


def test_everything_is_on_it(result: Result, tmp_path: Path):
    path = write_page(save(result, tmp_path / "out", source={"model": "zoo:<b>mine</b>"}))
    assert path == tmp_path / "out" / "report.html"
    reader, text = read(path)
    for section in ("headline", "layers", "curves", "again", "refined"):
        assert section in reader.sections
    assert ("channels" in reader.sections) == bool(result.plan.narrowings)
    assert "training" not in reader.sections
    assert "zoo:<b>mine</b>, compressed" in text, "names are text, whatever is in them"
    for layer in result.plan.layers:
        assert layer.name in text
    for reason in result.plan.skipped.values():
        assert reason in text
    for setting in result.plan.settings:
        assert setting in text or setting == "refined_blocks"
    share = 100 * result.after.macs / result.before.macs
    assert f"{share:.1f} % kept" in text
    assert "--budget macs=0.4" in text
    assert "--refine 1" in text
    compile(
        text[text.index("import rankfold") :].split(" Every setting")[0].replace("rankfold result", "rankfold; result"),
        "",
        "exec",
    )


def test_calibration_images_are_shown(result: Result, tmp_path: Path):
    folder = save(result, tmp_path / "out")
    shown = re.findall(
        r'<img src="data:image/png;base64,([^"]+)" alt="Calibration input \d"', write_page(folder).read_text()
    )
    assert len(shown) == 8
    image = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))[0]
    found = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(shown[0]))))).permute(2, 0, 1)
    low, high = image.min(), image.max()
    assert torch.equal(found, (255 * (image - low) / (high - low)).round().to(torch.uint8))
    without = save(replace(result, pictures=()), tmp_path / "without")
    assert "inputs" not in read(write_page(without))[0].sections


def test_pictures_are_of_images_alone_and_small():
    assert pictures([torch.zeros(2, 4, 8, 8)]) == pictures([{"ids": torch.zeros(2, 9).long()}]) == pictures([]) == ()
    (grey,) = pictures([torch.rand(1, 1, 300, 200)])
    assert Image.open(io.BytesIO(base64.b64decode(grey.partition(",")[2]))).size == (64, 96)


def test_every_chosen_point_lies_on_its_curve(result: Result, tmp_path: Path):
    folder = save(result, tmp_path / "out")
    points = json.loads((folder / "curves.json").read_text())["points"]
    assert points
    for layer in result.plan.decomposed:
        if layer.narrowed:
            continue
        shares, errors = zip(*points[layer.name], strict=True)
        assert list(shares) == sorted(shares)
        assert list(errors) == sorted(errors, reverse=True)
        share = layer.after.macs / layer.before.macs
        nearby = [error for at, error in points[layer.name] if abs(at - share) < 0.1]
        assert min(nearby) <= layer.predicted_error * 1.01
        assert max(nearby) >= layer.predicted_error * 0.99


def test_a_search_that_keeps_its_history_is_drawn(small_cnn: nn.Module, tmp_path: Path):
    image = torch.randn(1, 3, 8, 8)
    made = compress(
        small_cnn, image, decomposition="tucker", budget=Budget(macs=0.6), search=Rene(), calibration="none"
    )
    reader, text = read(write_page(save(made, tmp_path / "out"), tmp_path / "page.html"))
    assert "search" in reader.sections
    assert "How undecided each layer was" in text


def test_names_of_eighty_characters_and_four_hundred_layers(tmp_path: Path):
    torch.manual_seed(0)
    long = "a_block_whose_name_says_everything_there_is_to_say_of_it_and_a_little_more_number"
    model = nn.Sequential()
    for number_ in range(400):
        model.add_module(f"{long}_{number_}", nn.Linear(12, 12))
    made = compress(model, torch.randn(1, 12), decomposition="svd", budget=Budget(params=0.5), calibration="none")
    path = write_page(save(made, tmp_path / "out"))
    _, text = read(path)
    assert text.count(long) >= 400
    assert path.stat().st_size < 2**21


def test_a_single_layer(tmp_path: Path):
    made = compress(
        nn.Linear(16, 16), torch.randn(1, 16), decomposition="svd", budget=Budget(params=0.6), calibration="none"
    )
    _, text = read(write_page(save(made, tmp_path / "out")))
    assert "the model itself" in text


def test_the_command_line_writes_it_beside_every_result(tmp_path: Path, capsys, monkeypatch):
    out = tmp_path / "out"
    code, _, _ = run(
        capsys, monkeypatch, "compress", "zoo:digits", "-d", "svd", "-b", "params=0.5", "--out", str(out), "--json"
    )
    assert code == 0
    read(out / "report.html")
    code, told, _ = run(
        capsys, monkeypatch, "report", str(out), "--out", str(tmp_path / "deep" / "page.html"), "--json"
    )
    assert code == 0
    assert json.loads(told)["page"] == str(tmp_path / "deep" / "page.html")


def test_what_it_was_scored_with_is_kept_and_shown(tmp_path: Path, capsys, monkeypatch):
    out, data = tmp_path / "out", tmp_path / "digits.npz"
    x, y = np.random.default_rng(0).random((20, 1, 8, 8), dtype=np.float32), np.arange(20) % 10
    np.savez(data, x=x, y=y)
    run(capsys, monkeypatch, "compress", "zoo:digits", "-d", "svd", "-b", "params=0.5", "--out", str(out), "--json")
    assert "Accuracy was not measured" in read(out / "report.html")[1]
    code, told, _ = run(capsys, monkeypatch, "evaluate", str(out), "--data", f"npz:{data}", "--original", "--json")
    assert code == 0
    found = json.loads(told)
    assert json.loads((out / "evaluations.json").read_text()) == {f"npz:{data}": found}
    _, text = read(out / "report.html")
    assert "Accuracy was not measured" not in text
    scores = [found[side]["top1"] for side in ("compressed", "original")]
    assert f"Top-1, digits.npz {scores[0]:.2f} % from {scores[1]:.2f} %" in text
    (out / "evaluations.json").write_text("no")
    code, _, err = run(capsys, monkeypatch, "report", str(out))
    assert (code, err.count("\n")) == (2, 1)
    assert "remove it, and evaluate again" in err


def test_several_results_stand_on_one_page(small_cnn: nn.Module, tmp_path: Path, capsys, monkeypatch):
    folders = []
    for budget, score in ((0.7, 90.0), (0.4, 80.5)):
        made = compress(
            small_cnn, torch.randn(1, 3, 8, 8), decomposition="svd", budget=Budget(macs=budget), calibration="none"
        )
        folders.append(save(made, tmp_path / str(budget) / "out"))
        save_evaluation(folders[-1], "npz:a/test.npz", {"original": {"top1": 91.0}, "compressed": {"top1": score}})
    page = tmp_path / "both.html"
    code, _, err = run(capsys, monkeypatch, "compare", *map(str, folders), "--out", str(page))
    assert (code, err) == (0, "")
    reader, text = read(page)
    assert reader.sections == ["front", "results"]
    assert "0.7/out" in text, "names are told apart"
    assert "80.50" in text
    assert "top-1 % on npz:a/test.npz over MACs kept" in text
    assert page.read_text().count("<circle") == 6, "two results and the original, over two costs"
    (folders[0] / "evaluations.json").unlink()
    code, _, _ = run(capsys, monkeypatch, "compare", *map(str, folders), "--out", str(page))
    assert "not all scored on the same data" in read(page)[1]
    code, _, err = run(capsys, monkeypatch, "compare", str(folders[0]), "--out", str(page))
    assert code == 2
    assert "give two directories or more" in err


def test_a_damaged_directory_is_a_line_and_leaves_no_page(result: Result, tmp_path: Path, capsys, monkeypatch):
    folder = save(result, tmp_path / "out")
    (folder / "curves.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"curves\.json was truncated or altered"):
        write_page(folder)
    assert not (folder / "report.html").exists()
    code, _, err = run(capsys, monkeypatch, "report", str(tmp_path / "nothing"))
    assert (code, err.count("\n")) == (2, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        write_page(save(result, tmp_path / "other"), tmp_path / "file" / "page.html")


def test_lines_are_sound_and_leave_out_what_is_not_finite():
    drawn = lines("a < b", {"<one>": [(0, 1.0), (1, float("nan")), (2, 3.0)]}, "across", "up", marked=[(1, 2.0)])
    root = ElementTree.fromstring(str(drawn))
    assert root.attrib["aria-label"] == "a < b"
    (path,) = [one for one in root if one.attrib.get("class", "").startswith("line")]
    assert path.attrib["d"].count("L") == 1
    assert lines("nothing", {"one": []}, "across", "up") == ""
    assert ElementTree.fromstring(str(lines("one", {"a": [(0, 0.0)]}, "x", "y"))) is not None
    assert lines("log", {"a": [(0, 0.0)]}, "x", "y", log=True) == ""


def test_axes_have_round_ticks_within_their_range():
    axis = Axis(0.0, 0.87, 0, 100)
    assert axis.ticks() == pytest.approx([0, 0.5]) or len(axis.ticks()) >= 3
    assert [Axis(1e-4, 1.0, 0, 100, log=True).place(one) for one in (1e-4, 1e-2, 1.0)] == pytest.approx([0, 50, 100])
    assert [number(one) for one in (0.5, 12345, 2.5e6, 3e9)] == ["0.5", "12.35k", "2.5M", "3G"]
    assert len(thinned([(k, 0.0) for k in range(5000)])) <= 401


def test_a_result_that_is_slower_says_so_and_what_to_try(result: Result, tmp_path: Path):
    slow = save(result, tmp_path / "slow", metrics={"latency_ms": {"original": 1.0, "compressed": 1.4}})
    fast = save(result, tmp_path / "fast", metrics={"latency_ms": {"original": 1.4, "compressed": 1.0}})
    _, told = read(write_page(slow))
    assert "slower than the original" in told
    assert "--decomposition interpolative" in told
    assert "Latency, one input 1.4 ms from 1 ms: 140.0 % of it" in told
    assert "slower" not in read(write_page(fast))[1]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no browser")
@pytest.mark.parametrize("width", [380, 1200])
def test_a_browser_shows_every_section_without_a_word(result: Result, tmp_path: Path, width: int):
    page = write_page(save(result, tmp_path / "out"))
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr",
        f"--window-size={width},2000", f"--screenshot={tmp_path / 'shot.png'}", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr
    assert (tmp_path / "shot.png").stat().st_size > 20_000
