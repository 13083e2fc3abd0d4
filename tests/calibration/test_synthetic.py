"""Inputs made from the network: reproducible, spectrally like images, and closer to what batch norms hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rankfold import Budget, DataError, compress
from rankfold.calibration.synthetic import advice, pink_noise, synthetic_inputs, synthetic_like
from rankfold.calibration.tokens import Drawn, random_rows, with_written
from rankfold.sources.models import optional


@pytest.fixture
def normed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    images = 2 * pink_noise(64, (3, 16, 16), torch.Generator().manual_seed(9)) + 0.7
    model.train()
    for _ in range(40):
        model(images)
    return model.eval()


def distance(model: nn.Module, x: torch.Tensor) -> float:
    found = []

    def compare(module: nn.BatchNorm2d, args: tuple[torch.Tensor]) -> None:
        found.append(float(((args[0].mean((0, 2, 3)) - module.running_mean).square() / module.running_var).mean()))

    handles = [m.register_forward_pre_hook(compare) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return sum(found)


def test_amplitude_falls_with_frequency_and_colours_go_together():
    noise = pink_noise(64, (3, 32, 32), torch.Generator().manual_seed(0))
    assert noise.shape == (64, 3, 32, 32)
    assert float(noise.std()) == pytest.approx(1, abs=1e-4)
    spectrum = torch.fft.fft2(noise).abs().square().mean((0, 1))
    assert float(spectrum[0, 2]) / float(spectrum[0, 8]) == pytest.approx(16, rel=0.5)  # power like 1/f²
    correlation = torch.corrcoef(noise.movedim(1, 0).flatten(1))
    assert float(correlation[0, 1]) == pytest.approx(0.9, abs=0.05)


def test_inputs_come_closer_to_the_statistics_and_are_the_same_for_the_same_seed(normed: nn.Module):
    normed.train()
    before = [p.clone() for p in (*normed.parameters(), *normed.buffers())]
    found = synthetic_inputs(normed, (3, 16, 16), 140, seed=1, steps=20)
    assert [len(batch) for batch in found] == [128, 12]
    assert all(torch.equal(a, b) for a, b in zip(before, (*normed.parameters(), *normed.buffers()), strict=True))
    assert normed.training
    assert not any(module._forward_pre_hooks for module in normed.modules())
    normed.eval()
    start = pink_noise(128, (3, 16, 16), torch.Generator().manual_seed(1))
    assert distance(normed, found[0]) < 0.5 * distance(normed, start)
    again = synthetic_inputs(normed, (3, 16, 16), 140, seed=1, steps=20)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    other = synthetic_inputs(normed, (3, 16, 16), 140, seed=2, steps=1)
    assert not torch.equal(found[0], other[0])


def test_a_network_without_batch_norms_gets_noise(small_cnn: nn.Module):
    (found,) = synthetic_inputs(small_cnn, (3, 8, 8), 16)
    assert torch.equal(found, pink_noise(16, (3, 8, 8), torch.Generator().manual_seed(0)))
    assert pink_noise(4, (7,), torch.Generator()).shape == (4, 7)


class Reader(nn.Module):
    """Reads tokens by name, with segments and a mask beside them, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.segments, self.mix = nn.Embedding(50, 8), nn.Embedding(2, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, attention_mask: torch.Tensor):
        x = self.words(input_ids.view(-1, input_ids.shape[-1])) + self.segments(token_type_ids)
        return self.mix(x) * attention_mask[..., None]


def test_tokens_are_drawn_from_the_vocabulary_and_all_else_is_the_examples():
    model = Reader().eval()
    example = {
        "input_ids": torch.tensor([[1, 7, 8, 2], [1, 9, 2, 0]]),
        "token_type_ids": torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    before = {name: value.clone() for name, value in example.items()}
    kind, reason = advice(model, example)
    assert (kind, "vocabulary of 50" in reason) == ("synthetic", True)
    batches = synthetic_like(model, example, 200)
    assert [len(batch["input_ids"]) for batch in batches] == [128, 72]
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert (int(ids[:, 1:-1].min()), int(ids[:, 1:-1].max())) == (0, 49)
    assert torch.equal(ids[:, [0, -1]], example["input_ids"][:, [0, -1]].repeat(100, 1))
    for name in ("token_type_ids", "attention_mask"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), example[name].repeat(100, 1))
    again = synthetic_like(model, example, 200)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in example.items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    result = compress(model, example, decomposition="svd", budget=Budget(params=0.99))
    assert result.plan.settings["calibration_samples"] >= 32

    single = nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 4)).eval()
    (batch,) = synthetic_like(single, torch.zeros(1, 5, dtype=torch.int64), 3)
    assert batch[0].shape == (3, 5)


def test_what_cannot_be_made_is_said():
    model, numbers = nn.Linear(4, 4), (torch.zeros(1, 4), torch.zeros(1, 4))
    assert advice(model, numbers)[0] == "none"
    with pytest.raises(DataError, match="give a few unlabelled inputs"):
        synthetic_like(model, numbers)


class OfFour(nn.Module):
    """A network that takes batches of four alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.register_buffer("state", torch.zeros(4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)).relu().mean((2, 3))) + self.state


def test_batches_have_the_examples_size_where_the_network_takes_no_other():
    made = synthetic_like(OfFour().eval(), torch.zeros(4, 3, 8, 8), 10)
    assert [len(batch) for batch in made] == [4, 4, 4]


class Pooled(nn.Module):
    """Batch norms, and a classifier behind a pooling to some size, or of as many places as an image of 192² has."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.BatchNorm2d(4)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.pool = nn.AdaptiveAvgPool2d(size) if size else nn.MaxPool2d(16)
        self.last = nn.Linear(4 * (size or 3) ** 2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.pool(self.norm(self.first(x)).relu()).flatten(1))


@pytest.mark.parametrize(("size", "side"), [(1, 96), (7, 192), (None, 192)])
def test_large_images_are_made_smaller_where_all_that_has_places_gets_fewer(size: int | None, side: int):
    model = Pooled(size).eval()
    made = torch.cat(synthetic_like(model, torch.zeros(1, 3, 192, 192)))
    assert made.shape == (96 if side == 96 else 32, 3, side, side)
    assert torch.cat(synthetic_like(model, torch.zeros(1, 3, 192, 192), 8)).shape == (8, 3, side, side)


def test_images_that_are_not_large_keep_their_size():
    assert torch.cat(synthetic_like(Pooled(1).eval(), torch.zeros(1, 3, 160, 192), 2)).shape == (2, 3, 160, 192)


def test_written_tokens_follow_the_distribution_that_they_are_drawn_from():
    """Within three deviations for every token, none that would end the row, and none that is impossible."""
    model = nn.Identity()
    model.generation_config = SimpleNamespace(eos_token_id=[2, 5])  # pyrefly: ignore[bad-assignment]
    logits = torch.tensor([0.0, 1.0, 9.0, -2.0, -torch.inf, 3.0, 2.0, -torch.inf])
    count = 40_000
    left = Drawn(model, 3)(torch.zeros(count, 1, dtype=torch.int64), logits.repeat(count, 1))
    assert torch.equal((left > -torch.inf).sum(1), torch.ones(count, dtype=torch.int64))
    found = torch.bincount(left.argmax(1), minlength=8) / count
    expected = logits.index_fill(0, torch.tensor([2, 5]), -torch.inf).softmax(0)
    assert bool(((found - expected).abs() <= 3 * (expected * (1 - expected) / count).sqrt()).all())


def test_a_model_that_predicts_the_next_token_writes_its_own_inputs():
    """What it writes is likely to it, at random tokens are not; and it is the same whenever it is asked."""
    transformers = optional("transformers", "hf")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # surer of what comes next
    example = {"input_ids": torch.arange(24)[None], "use_cache": False}
    assert advice(model, example) == ("synthetic", "tokens that it writes itself; a few real inputs are better")
    batches = synthetic_like(model, example, 40)
    assert [batch["input_ids"].shape for batch in batches] == [(40, 24)]
    assert batches[0]["use_cache"] is False
    again = synthetic_like(model, example, 40)
    assert torch.equal(batches[0]["input_ids"], again[0]["input_ids"])
    chance = random_rows(example["input_ids"], 60, 40)

    text = torch.full((9, 24), 59)
    mixed = with_written(model, text, 1 / 3)
    assert [bool((row == 59).all()) for row in mixed] == [True, True, False] * 3
    assert torch.equal(mixed[[2, 5, 8]], with_written(model, text, 1 / 3)[[2, 5, 8]])
    assert torch.equal(with_written(model, text, 0.0), text)
    with pytest.raises(DataError, match="Reader does not predict the next token"):
        with_written(Reader(), text, 0.5)

    def loss(rows: torch.Tensor) -> float:
        with torch.no_grad():
            return float(model(input_ids=rows, labels=rows).loss)

    assert loss(batches[0]["input_ids"]) < 0.9 * loss(chance)
