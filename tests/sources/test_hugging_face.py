"""Inputs that models of every modality run on, made from nothing but their configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankfold import ModelError, analyze
from rankfold.sources.models import build_model, optional

transformers = optional("transformers", "hf")

TEXT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99,
}  # fmt: skip
BLOCKS = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16,
}  # fmt: skip
SPEECH = {**TEXT, "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SEEN = {key: value for key, value in TEXT.items() if key != "vocab_size"}
IMAGE = {**SEEN, "patch_size": 8}

CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "bert": ("BertConfig", TEXT, {"input_ids": (1, 128)}),
    "short bert": ("BertConfig", {**TEXT, "max_position_embeddings": 20}, {"input_ids": (1, 20)}),
    "roberta": ("RobertaConfig", {**TEXT, "max_position_embeddings": 20}, {"input_ids": (1, 18)}),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 99}, {"input_ids": (1, 128)}),
    "llama": ("LlamaConfig", TEXT, {"input_ids": (1, 128)}),
    "t5": (
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 99},
        {"input_ids": (1, 128), "decoder_input_ids": (1, 128)},
    ),
    "bart": (
        "BartConfig",
        {**BLOCKS, "vocab_size": 99, "max_position_embeddings": 40},
        {"input_ids": (1, 40), "decoder_input_ids": (1, 40)},
    ),
    "whisper": (
        "WhisperConfig",
        {**BLOCKS, "vocab_size": 99, "num_mel_bins": 20, "max_source_positions": 60, "max_target_positions": 12,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        {"input_features": (1, 20, 120), "decoder_input_ids": (1, 12)},
    ),
    "wav2vec2": ("Wav2Vec2Config", SPEECH, {"input_values": (1, 16000)}),
    "hubert": ("HubertConfig", SPEECH, {"input_values": (1, 16000)}),
    "spectrogram": ("ASTConfig", {**IMAGE, "max_length": 64, "num_mel_bins": 32}, {"input_values": (1, 64, 32)}),
    "clip vision": ("CLIPVisionConfig", {**IMAGE, "image_size": 32}, {"pixel_values": (1, 3, 32, 32)}),
    "clip": (
        "CLIPConfig",
        {"text_config": {**TEXT, "max_position_embeddings": 10, "eos_token_id": 2},
         "vision_config": {**IMAGE, "image_size": 32}, "projection_dim": 8},
        {"input_ids": (1, 10), "pixel_values": (1, 3, 32, 32)},
    ),
    "siglip": (
        "SiglipConfig",
        {"text_config": {**TEXT, "max_position_embeddings": 10}, "vision_config": {**IMAGE, "image_size": 32}},
        {"input_ids": (1, 10), "pixel_values": (1, 3, 32, 32)},
    ),
    "vit": ("ViTConfig", {**IMAGE, "image_size": 32, "num_channels": 1}, {"pixel_values": (1, 1, 32, 32)}),
    "oblong vit": ("ViTConfig", {**IMAGE, "image_size": [32, 48]}, {"pixel_values": (1, 3, 32, 48)}),
    "swin": (
        "SwinConfig",
        {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "patch_size": 4},
        {"pixel_values": (1, 3, 32, 32)},
    ),
}  # fmt: skip


def configured(kind: str, folder: Path) -> str:
    """A MODEL for a directory with nothing but a configuration."""
    name, settings, _ = CONFIGS[kind]
    getattr(transformers, name)(**settings).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_directory_with_a_configuration_can_be_analysed(kind: str, tmp_path: Path):
    source = build_model(configured(kind, tmp_path))
    expected = CONFIGS[kind][2]
    inputs = source.example_inputs()
    shapes = (
        {name: tuple(one.shape) for name, one in inputs.items()}
        if isinstance(inputs, dict)
        else {"": tuple(inputs.shape)}
    )
    assert list(shapes.values()) == list(expected.values())
    if isinstance(inputs, dict):
        assert shapes == expected
    else:
        assert source.input_shape == tuple(inputs.shape[1:])
    assert "holds no weights" in source.note
    report = analyze(source.model, inputs, decomposition="svd")
    assert report.cost.macs > 0
    assert 0 <= report.within_reach["params"] <= 1
    never = [name for name, reason in report.skipped.items() if "never called" in reason]
    assert len(never) <= 1, never  # all parts of the model take part: both encoders, or encoder and decoder
    again = build_model(f"hf:{tmp_path}")
    assert all(torch.equal(a, b) for a, b in zip(source.model.parameters(), again.model.parameters(), strict=True))


def test_tokens_leave_padding_out_and_stay_within_the_vocabulary(tmp_path: Path):
    for pad in (0, 1, 6):
        transformers.BertConfig(**{**TEXT, "vocab_size": 7, "pad_token_id": pad}).save_pretrained(tmp_path)
        ids = build_model(f"hf:{tmp_path}").example_inputs()
        assert pad not in ids
        assert set(ids.flatten().tolist()) == set(range(7)) - {pad}


def test_weights_are_loaded_where_there_are_any(tmp_path: Path, capsys):
    model = transformers.BertModel(transformers.BertConfig(**TEXT))
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    source = build_model(f"hf:{tmp_path}")
    assert source.note == ""
    assert torch.equal(source.model.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)
    config = (tmp_path / "config.json").read_text().replace("BertModel", "BertForSequenceClassification")
    (tmp_path / "config.json").write_text(config)
    assert "lacks classifier.bias, classifier.weight: random" in build_model(f"hf:{tmp_path}").note
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        build_model(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("google/no-such-model", "the Hub cannot be reached; download it first, or give a directory"),
        ("./nowhere", "there is no such directory"),
        ("a/b/c", "there is no such directory"),
        ("{folder}", "holds no config.json"),
        ("{folder}/broken", "cannot be loaded"),
    ],
)
def test_what_cannot_be_had_is_one_line(name: str, message: str, tmp_path: Path, monkeypatch, capfd):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "nonsense"}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=message) as caught:
        build_model("hf:" + name.replace("{folder}", str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_factory_of_such_a_model_needs_no_input_shape(tmp_path: Path):
    code = f"import transformers\ndef net():\n    return transformers.BertModel(transformers.BertConfig(**{TEXT!r}))\n"
    (tmp_path / "nets.py").write_text(code)
    source = build_model(f"{tmp_path / 'nets.py'}:net")
    assert source.input_shape == (128,)
    assert source.vocabulary == 99


def test_a_source_that_knows_nothing_says_so():
    from rankfold.sources.models import Source

    with pytest.raises(ModelError, match="give their shape"):
        Source(nn.Linear(2, 2), None, None).example_inputs()
    assert Source(nn.Linear(2, 2), (2,), None).example_inputs().shape == (1, 2)
