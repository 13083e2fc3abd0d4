"""Models that come as a directory with a configuration, on the command line, without a word on their inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run

from rankfold.files.artifact import load_plan
from rankfold.sources.models import optional

transformers = optional("transformers", "hf")

BLOCKS = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16, "vocab_size": 99,
}  # fmt: skip


@pytest.fixture
def bart(tmp_path: Path) -> str:
    """An encoder-decoder: it takes two inputs."""
    config = transformers.BartConfig(**BLOCKS, max_position_embeddings=24, architectures=["BartModel"])
    config.save_pretrained(tmp_path / "bart")
    return f"hf:{tmp_path / 'bart'}"


def test_analyze_needs_nothing_but_the_directory(bart: str, capsys, monkeypatch):
    code, text, err = run(capsys, monkeypatch, "analyze", bart, "-d", "svd", "--json")
    report = json.loads(text)
    assert code == 0
    assert set(report["within_reach"]) == {"params", "macs"}
    assert "decoder.layers.0.encoder_attn.out_proj" in [layer["name"] for layer in report["layers"]]
    assert err.count("\n") == 1
    assert "holds no weights: they are random" in err
    monkeypatch.setenv("COLUMNS", "40")
    code, text, _ = run(capsys, monkeypatch, "analyze", bart, "-d", "svd")
    assert code == 0
    assert "\ndecoder.layers.0.encoder_attn.out_proj  Linear  16×16" in text
    assert "within reach: " in text


def test_compress_takes_several_inputs_as_they_are(bart: str, npz: Path, tmp_path: Path, capsys, monkeypatch):
    common = ("compress", bart, "-d", "svd", "-b", "params=0.9", "--out", str(tmp_path / "out"))
    code, text, _ = run(capsys, monkeypatch, *common, "--calibration", "none", "--json")
    assert code == 0
    assert json.loads(text)["kept"]["params"] <= 0.9
    assert load_plan(tmp_path / "out").source["model"] == bart
    for option in ("--calibration", "--finetune"):
        code, _, err = run(capsys, monkeypatch, *common, option, f"npz:{npz}")
        assert code == 2
        assert "holds one input per example, and this model takes several" in err


def test_a_name_that_cannot_be_reached_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = run(capsys, monkeypatch, "analyze", "hf:google/no-such-model")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("rankfold: hf:google/no-such-model cannot be loaded: ")
