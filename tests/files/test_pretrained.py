"""Compressed Hugging Face models as directories that transformers loads, with rankfold or without."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo_of_architectures import ARCHITECTURES

from rankfold import ArtifactError, Budget, ModelError, compress, plan_of, save_pretrained
from rankfold.network.passes import run, tensors_in
from rankfold.sources.models import optional

transformers = optional("transformers", "hf")

WITHOUT = """
import sys
sys.modules["torchvision"] = None
from transformers import LlamaForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
print("loaded", sum(p.numel() for p in model.parameters()))
"""


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{
        "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 64, **settings,
    })  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(60, (rows, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def compressed() -> Any:
    return compress(llama(), tokens(1), decomposition="svd", budget=Budget(params=0.8), calibration="none")


def test_without_rankfold_a_model_with_factors_does_not_load(compressed: Any, tmp_path: Path):
    save_pretrained(compressed, tmp_path / "ours")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(again(tokens()).logits, compressed.model(tokens()).logits)
        assert plan_of(again) == compressed.plan
        done = subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path / folder)], capture_output=True, text=True)
        assert done.returncode != 0
        assert "loaded" not in done.stdout
        assert "mismatched" in done.stderr


def test_widths_that_the_configuration_can_say_load_without_rankfold(tmp_path: Path):
    model = llama()
    batches = list(tokens(40).split(4))
    result = compress(
        model, tokens(1), decomposition="interpolative", budget=Budget(params=0.8), calibration=batches,
        include=["model.layers.*.mlp.*"],
    )  # fmt: skip
    widths = {len(one.kept) for one in result.plan.narrowings}
    even = compress(
        model, tokens(1), decomposition="interpolative", budget=Budget(params=0.8), calibration=batches,
        search="uniform",
    )  # fmt: skip
    assert len(even.plan.narrowings) == 2
    (width,) = {len(one.kept) for one in even.plan.narrowings}
    config = transformers.AutoConfig.from_pretrained(save_pretrained(even, tmp_path / "even"))
    assert config.intermediate_size == width < 96
    assert not hasattr(config, "quantization_config")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path / "even")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["loaded", str(even.after.params)]
    config = transformers.AutoConfig.from_pretrained(save_pretrained(result, tmp_path / "both"))
    assert hasattr(config, "quantization_config") == (len(widths) > 1)
    for made, folder in ((even, "even"), (result, "both")):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(loaded(tokens()).logits, made.model(tokens()).logits)


def test_it_writes_on_with_its_cache_and_is_trained(compressed: Any, tmp_path: Path):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(save_pretrained(compressed, tmp_path / "small"))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (loaded.generate(tokens(), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    assert torch.equal(cached, compressed.model.generate(tokens(), **options))
    optimiser = torch.optim.SGD(loaded.train().parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = loaded(input_ids=tokens(), labels=tokens()).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_adapters_attach_to_its_factors_and_train(compressed: Any, tmp_path: Path):
    peft = pytest.importorskip("peft")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(save_pretrained(compressed, tmp_path / "small"))
    whole = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    adapted = peft.get_peft_model(loaded, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = {name for name, one in adapted.named_parameters() if one.requires_grad}
    assert any(f".{layer.name}.0.lora_A" in name for name in names for layer in compressed.plan.decomposed)
    trained = [one for one in adapted.parameters() if one.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=tokens(), labels=tokens()).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    with adapted.disable_adapter():
        assert torch.allclose(adapted(tokens()).logits, compressed.model(tokens()).logits, atol=1e-5)
    assert all(torch.equal(whole[name], one) for name, one in adapted.unload().state_dict().items())


def test_bfloat16_ties_shards_and_the_generation_configuration_are_kept(tmp_path: Path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    model.generation_config.max_new_tokens = 7
    result = compress(model, tokens(1), decomposition="svd", budget=Budget(params=0.8), calibration="none")
    path = save_pretrained(result, tmp_path / "small", max_shard_size="10KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.max_new_tokens == 7
    assert torch.equal(loaded(tokens()).logits, result.model(tokens()).logits)
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(result.model.config, "quantization_config")


@pytest.mark.parametrize(
    "name", ["gpt2", "opt", "qwen3", "gemma3", "mixtral", "falcon", "t5", "bert", "whisper", "wav2vec2"]
)
def test_any_architecture_is_loaded(name: str, tmp_path: Path):
    model, inputs = ARCHITECTURES[name].build()
    result = compress(model, inputs, decomposition="svd", budget=Budget(params=0.9), calibration="none")
    loaded = type(model).from_pretrained(save_pretrained(result, tmp_path / "small"))
    pairs = zip(tensors_in(run(loaded, inputs)), tensors_in(run(result.model, inputs)), strict=True)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in pairs)


def test_what_cannot_be_saved_is_said_and_nothing_is_touched(compressed: Any, image: torch.Tensor, tmp_path: Path):
    plain = nn.Sequential(nn.Linear(30, 30))
    small = compress(plain, torch.randn(1, 30), decomposition="svd", budget=Budget(params=0.5), calibration="none")
    with pytest.raises(ModelError, match=r"not a model of transformers; save it with rankfold\.save"):
        save_pretrained(small, tmp_path / "small")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="holds other files"):
        save_pretrained(compressed, tmp_path / "mine")
    assert [one.name for one in tmp_path.iterdir()] == ["mine"]
    broken = copy.deepcopy(compressed.model)
    broken.save_pretrained = lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(ArtifactError, match="No space left on device; nothing was changed"):
        save_pretrained(broken, tmp_path / "full")
    assert [one.name for one in tmp_path.iterdir()] == ["mine"]
