"""Language models on the command line: calibrated on a text, and scored by perplexity beside their originals."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from command_line import run

from rankfold.sources.models import optional

transformers = optional("transformers", "hf")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{number}" for number in range(58)]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A directory with a small causal model, its weights, and a tokenizer of sixty words."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<unk>", "</s>", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A thousand words."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=1000)), encoding="utf-8")
    return path


def test_a_language_model_is_compressed_and_scored_on_text(
    llama: Path, text: Path, tmp_path: Path, capsys, monkeypatch
):
    out = tmp_path / "small"
    common = ("-d", "svd,interpolative", "-b", "params=0.8", "--calibration", f"text:{text}", "--length", "16")
    code, _, err = run(capsys, monkeypatch, "compress", f"hf:{llama}", *common, "--out", str(out), "--json")
    assert (code, err) == (0, "")
    settings = json.loads((out / "plan.json").read_text())["settings"]
    assert settings["calibration_samples"] == 1000 // 16
    code, told, _ = run(
        capsys,
        monkeypatch,
        "evaluate",
        str(out),
        "--data",
        f"text:{text}",
        "--length",
        "50",
        "--samples",
        "7",
        "--json",
    )
    report = json.loads(told)
    assert code == 0
    assert {name: report[name] for name in ("blocks", "length", "stride", "predicted_tokens", "text_tokens")} == {
        "blocks": 7, "length": 50, "stride": 158, "predicted_tokens": 7 * 49, "text_tokens": 1000,
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokens = transformers.AutoTokenizer.from_pretrained(llama)(text.read_text(), return_tensors="pt").input_ids[0]
    rows = [tokens[start : start + 50][None] for start in torch.linspace(0, 950, 7).long().tolist()]
    with torch.no_grad():
        losses = [float(model(input_ids=row, labels=row).loss) for row in rows]
    assert report["original"]["perplexity"] == pytest.approx(math.exp(sum(losses) / 7), rel=1e-4)
    assert report["compressed"]["perplexity"] != report["original"]["perplexity"]
    assert report["compressed"]["params"] <= 0.8 * report["original"]["params"]
    assert min(report[side]["tokens_per_second"]["written"] for side in ("original", "compressed")) > 0
    code, shown, _ = run(capsys, monkeypatch, "evaluate", str(out), "--data", f"text:{text}", "--length", "64")
    assert code == 0
    assert "perplexity" in shown
    assert "15 blocks of 64 tokens" in shown


@pytest.mark.parametrize(
    ("content", "length", "said"),
    [("w1 w2", "16", "has 2 tokens, not a block of 16"), (None, "16", "does not exist"), (b"\xff\xfe", "16", "UTF-8")],
)
def test_texts_that_cannot_be_used(
    content: str | bytes | None, length: str, said: str, llama: Path, tmp_path: Path, capsys, monkeypatch
):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    code, _, err = run(
        capsys, monkeypatch, "compress", f"hf:{llama}", "-d", "svd", "-b", "params=0.8", "--out", str(tmp_path / "out"),
        "--calibration", f"text:{path}", "--length", length,
    )  # fmt: skip
    assert (code, err.count("\n")) == (2, 1)
    assert said in err


def test_models_without_a_tokenizer_and_those_that_predict_no_next_token_are_refused(
    text: Path, tmp_path: Path, capsys, monkeypatch
):
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=60,
        architectures=["BertForMaskedLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "bert")
    common = ("compress", f"hf:{tmp_path / 'bert'}", "-d", "svd", "-b", "params=0.9", "--out", str(tmp_path / "out"))
    code, _, err = run(capsys, monkeypatch, *common, "--calibration", f"text:{text}")
    assert code == 2
    assert "has no tokenizer: the directory holds none of tokenizer.json" in err
    assert run(capsys, monkeypatch, *common, "--calibration", "none")[0] == 0
    code, _, err = run(capsys, monkeypatch, "evaluate", str(tmp_path / "out"), "--data", f"text:{text}")
    assert code == 2
    assert "BertForMaskedLM does not predict the next token" in err
    code, _, err = run(
        capsys, monkeypatch, "compress", "zoo:digits", "-d", "svd", "-b", "params=0.9", "--out", str(tmp_path / "other"),
        "--calibration", f"text:{text}",
    )  # fmt: skip
    assert code == 2
    assert "needs a model with a tokenizer" in err


def test_a_language_model_is_fine_tuned_on_text(llama: Path, tmp_path: Path, capsys, monkeypatch):
    text = tmp_path / "pattern.txt"
    text.write_text(" ".join(WORDS[k * k % 7] for k in range(2000)), encoding="utf-8")
    out, tuned = tmp_path / "small", tmp_path / "tuned"
    common = ("-d", "svd", "-b", "params=0.8", "--calibration", "none")
    code, _, err = run(capsys, monkeypatch, "compress", f"hf:{llama}", *common, "--out", str(out), "--json")
    assert (code, err) == (0, "")
    options = (
        "--data", f"text:{text}", "--length", "20", "--epochs", "3", "--optimiser", "sgd", "--rate", "0.1",
        "--test", f"text:{text}",
    )  # fmt: skip
    code, told, err = run(
        capsys, monkeypatch, "finetune", str(out), *options, "--logits", "0", "--out", str(tuned), "--json"
    )
    assert (code, err) == (0, "")
    report = json.loads(told)
    scores = report["held_out_perplexity"]
    assert scores["fine-tuned"] < 0.5 * scores["compressed"]
    assert report["epochs"][-1]["perplexity"] == pytest.approx(scores["fine-tuned"], rel=1e-4)
    assert report["epochs"][-1]["top1"] is None
    assert set(report["test_perplexity"]) == {"original", "compressed", "fine-tuned"}
    page = (tuned / "report.html").read_text()
    assert "Perplexity, held out" in page
    assert "Perplexity on held-out data over the epochs" in page
    code, told, _ = run(
        capsys, monkeypatch, "evaluate", str(tuned), "--data", f"text:{text}", "--length", "20", "--json"
    )
    assert code == 0
    assert json.loads(told)["compressed"]["perplexity"] == pytest.approx(
        report["test_perplexity"]["fine-tuned"], rel=1e-3
    )
    code, _, err = run(capsys, monkeypatch, "finetune", str(out), "--data", "text:none.txt", "--out", str(tuned))
    assert (code, "none.txt does not exist" in err) == (2, True)


def test_a_model_of_sentences_is_scored_on_pairs(llama: Path, tmp_path: Path, capsys, monkeypatch):
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=60,
    )  # fmt: skip
    bert, out, pairs = tmp_path / "bert", tmp_path / "small", tmp_path / "pairs.csv"
    transformers.BertModel(config).save_pretrained(bert)
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(bert)
    drawn = random.Random(0)
    rows = [
        [" ".join(drawn.choices(WORDS, k=drawn.randint(2, 6))) for _ in "ab"] + [str(drawn.random())] for _ in range(9)
    ]
    pairs.write_text("\n".join(map(",".join, rows)), encoding="utf-8")
    capsys.readouterr()
    code, _, err = run(
        capsys, monkeypatch, "compress", f"hf:{bert}", "-d", "svd", "-b", "params=0.9", "--out", str(out),
        "--calibration", "synthetic", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    code, told, _ = run(capsys, monkeypatch, "evaluate", str(out), "--data", f"pairs:{pairs}", "--json")
    report = json.loads(told)
    assert (code, report["pairs"]) == (0, 9)
    for side in ("original", "compressed"):
        assert -100 <= report[side]["spearman"] <= 100
        assert report[side]["latency_ms"] > 0
    code, shown, _ = run(capsys, monkeypatch, "evaluate", str(out), "--data", f"pairs:{pairs}")
    assert code == 0
    assert "Spearman %" in shown
    assert "9 pairs of sentences" in shown
    assert "Spearman, pairs.csv" in (out / "report.html").read_text(encoding="utf-8")


def test_a_model_writes_a_share_of_what_it_is_calibrated_on(
    llama: Path, text: Path, tmp_path: Path, capsys, monkeypatch
):
    common = ("compress", f"hf:{llama}", "-d", "svd", "-b", "params=0.9", "--out", str(tmp_path / "out"))
    options = ("--calibration", f"text:{text}", "--length", "16", "--json")
    found = []
    for more in ((), ("--written", "0"), ("--written", "0.5")):
        code, _, err = run(capsys, monkeypatch, *common, *options, *more)
        assert (code, err) == (0, "")
        plan = json.loads((tmp_path / "out" / "plan.json").read_text())
        assert plan["settings"]["calibration_samples"] == 1000 // 16
        found.append([layer["error"] for layer in plan["layers"]])
    assert found[0] == found[1] != found[2]
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"--calibration text:{text} --calibration-samples {1000 // 16} --length 16 --written 0.5" in page
    code, _, err = run(capsys, monkeypatch, *common, "--written", "0.5")
    assert (code, "--written is for --calibration text:FILE, not auto" in err) == (2, True)
