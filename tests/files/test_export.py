"""Files for deployment: what was written runs elsewhere and gives what the model does."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import run

from rankfold import ArtifactError, Budget, ModelError, compress, load, save
from rankfold.decompositions import DECOMPOSITIONS
from rankfold.files.export import finalize
from rankfold.sources.models import build_model, optional

onnxruntime = pytest.importorskip("onnxruntime")

OUTPUTS_BY_NAME = """
import torch
from torch import nn

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(16, 32), nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        hidden = torch.relu(self.norm(self.first(x)))
        return {"logits": self.head(hidden), "hidden": hidden}

def make():
    torch.manual_seed(0)
    return Named()
"""


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    source = build_model("zoo:digits")
    example = source.example_inputs()
    result = compress(source.model, example, decomposition="tucker", budget=Budget(macs=0.5), calibration="none")
    return save(result, tmp_path / "small", source={"model": "zoo:digits", "seed": 0, "input_shape": [1, 8, 8]})


def test_an_onnx_file_gives_what_the_model_does_for_any_number_of_examples(digits: Path, tmp_path: Path):
    found = finalize(digits, tmp_path / "deep" / "model.onnx")
    assert found.free
    assert found.difference < 1e-4
    assert len(found.latency_ms) == 2
    assert [one.name for one in found.path.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(found.path))
    (given,) = session.get_inputs()
    model = load(digits, build_model("zoo:digits").model)
    for rows in (1, 2, 7):
        x = torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(session.run(None, {given.name: x.numpy()})[0]), model(x), atol=1e-4)


@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
def test_outputs_by_name_and_tokens_of_any_length(ending: str, tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "both.py").write_text(OUTPUTS_BY_NAME)
    made = tmp_path / "made"
    common = ("-d", "svd", "-b", "params=0.7", "--calibration", "none", "--input-shape", "16", "--out", str(made))
    assert run(capsys, monkeypatch, "compress", f"{tmp_path / 'both.py'}:make", *common, "--json")[0] == 0
    found = finalize(made, tmp_path / f"both{ending}")
    assert found.free
    assert found.folded == 1


def test_a_language_model_takes_texts_of_any_length(tmp_path: Path):
    transformers = optional("transformers", "hf")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    source = build_model(f"hf:{tmp_path / 'llama'}")
    example = source.example_inputs()
    result = compress(source.model, example, decomposition="svd", budget=Budget(params=0.8), calibration="none")
    made = save(
        result, tmp_path / "small", source={"model": f"hf:{tmp_path / 'llama'}", "input_shape": list(example.shape[1:])}
    )
    found = finalize(made, tmp_path / "llama.onnx")
    assert found.free
    session = onnxruntime.InferenceSession(str(found.path))
    (given,) = session.get_inputs()
    assert given.name == "input_ids"
    for shape in ((1, 5), (3, 20)):
        tokens = torch.randint(60, shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = result.model(tokens).logits
        assert torch.allclose(torch.from_numpy(session.run(None, {given.name: tokens.numpy()})[0]), wanted, atol=1e-4)


def test_what_cannot_be_written_is_said_and_nothing_is_left(digits: Path, tmp_path: Path, capsys, monkeypatch):
    with pytest.raises(ArtifactError, match=r"give one of \.pt2, \.onnx"):
        finalize(digits, tmp_path / "model.tflite")
    monkeypatch.setattr("rankfold.files.export.LARGEST_ONNX", 10)
    with pytest.raises(ModelError, match=r"one ONNX file holds less than 2; write \.pt2"):
        finalize(digits, tmp_path / "model.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    monkeypatch.setattr("rankfold.files.export.LARGEST_ONNX", 2**31)
    code, _, err = run(capsys, monkeypatch, "finalize", str(digits), "--out", str(tmp_path / "model.onnx"))
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install 'rankfold[onnx]'" in err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["small"]


def test_a_network_that_decides_by_its_data_is_a_line(tmp_path: Path):
    (tmp_path / "fickle.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Fickle(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return self[0](x) if float(x.sum()) > 0 else self[1](x)\n\n"
        "def make():\n    return Fickle(nn.Linear(16, 16), nn.Linear(16, 16))\n"
    )
    source = build_model(f"{tmp_path / 'fickle.py'}:make")
    made = compress(source.model, torch.ones(1, 16), decomposition="svd", budget=Budget(params=0.8), calibration="none")
    folder = save(made, tmp_path / "small", source={"model": f"{tmp_path / 'fickle.py'}:make", "input_shape": [16]})
    with pytest.raises(ModelError, match="the network cannot be exported: "):
        finalize(folder, tmp_path / "model.pt2")


@pytest.mark.parametrize("decomposition", [*DECOMPOSITIONS, "interpolative"])
def test_what_comes_out_is_compiled_as_one_graph(decomposition: str, small_cnn: torch.nn.Module):
    x = torch.randn(2, 3, 8, 8)
    batches = [torch.randn(32, 3, 8, 8) for _ in range(2)]
    result = compress(small_cnn, x, decomposition=decomposition, budget=Budget(macs=0.6), calibration=batches)
    compiled = torch.compile(result.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), result.model(x))


def test_an_operator_that_onnx_lacks_is_named_with_its_layer(tmp_path: Path):
    (tmp_path / "odd.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "@torch.library.custom_op('rankfold_tests::odd', mutates_args=())\n"
        "def odd(x: torch.Tensor) -> torch.Tensor:\n    return x.clone()\n\n"
        "@odd.register_fake\ndef _(x):\n    return torch.empty_like(x)\n\n"
        "class Odd(nn.Module):\n    def forward(self, x):\n        return odd(x)\n\n"
        "def make():\n"
        "    return nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.ReLU(), Odd()), nn.Linear(16, 16))\n"
    )
    source = build_model(f"{tmp_path / 'odd.py'}:make")
    made = compress(source.model, torch.ones(1, 16), decomposition="svd", budget=Budget(params=0.8), calibration="none")
    folder = save(made, tmp_path / "small", source={"model": f"{tmp_path / 'odd.py'}:make", "input_shape": [16]})
    with pytest.raises(
        ModelError, match=r"1\.1: its operator rankfold_tests\.odd\.default cannot be written as ONNX: "
    ):
        finalize(folder, tmp_path / "model.onnx")
    left = {one.name for one in tmp_path.iterdir() if one.suffix in ("", ".onnx")}
    assert left - {"__pycache__"} == {"small"}, "the module's bytecode may lie beside it"


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_a_full_disk_is_a_line_and_leaves_nothing(name: str, digits: Path, tmp_path: Path):
    command = ("-m", "rankfold", "finalize", str(digits), "--out", str(tmp_path / name))
    script = f'ulimit -f 8; exec "{sys.executable}" {shlex.join(command)}'  # 8 blocks; the file is larger
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "nothing was changed" in done.stderr
    assert sorted(one.name for one in tmp_path.iterdir()) == ["small"]


def test_the_command_line_tells_both_times(digits: Path, tmp_path: Path, capsys, monkeypatch):
    out = tmp_path / "model.onnx"
    code, text, err = run(capsys, monkeypatch, "finalize", str(digits), "--out", str(out), "--json")
    assert (code, err) == (0, "")
    told = json.loads(text)
    assert set(told["latency_ms"]) == {"original", "compressed"}
    assert told["free"]
    out.unlink()
    code, text, _ = run(capsys, monkeypatch, "finalize", str(digits), "--out", str(out))
    assert "in ONNX Runtime, two examples:" in text
