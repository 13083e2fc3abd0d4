from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rankfold import Budget, DataError, ModelError, compress
from rankfold.evaluation import accuracy, latency
from rankfold.reports.demo import digits
from rankfold.sources import zoo
from rankfold.sources.data import Normalisation, open_dataset
from rankfold.sources.models import build_model, load_weights_, optional

PLAIN = Normalisation((0.0,), (1.0,))


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_zoo_networks_build_and_run(name: str):
    source = build_model(f"zoo:{name}")
    with torch.no_grad():
        assert source.model(torch.zeros(1, *source.input_shape)).shape[0] == 1


BASELINES = {
    "cifar10_resnet20": ("cifar10_resnet20", "cifar10/test", 91.73),
    "mnist_lenet": ("mnist_lenet", "mnist/test", 98.95),
    "deit_tiny": ("imagenet_deit_tiny", "imagenet_sample/images", 78.8),
    "mobilenet_v2": ("imagenet_mobilenet_v2", "imagenet_sample/images", 81.8),
    "cifar10_resnet32": ("cifar10_resnet32", "cifar10/test", 92.63),
}


@pytest.mark.parametrize("name", BASELINES)
def test_zoo_networks_reach_their_baselines(name: str, data: Path):
    weights, dataset, expected = BASELINES[name]
    source = build_model(f"zoo:{name}")
    load_weights_(source.model, data / "weights" / f"{weights}.safetensors")
    labelled = open_dataset(f"npz:{data / dataset}.npz", source.input_shape, source.normalisation)
    assert accuracy(source.model, labelled, batch_size=100).top1 == pytest.approx(expected, abs=0.006)


def test_the_same_seed_builds_the_same_network_and_the_global_state_is_kept():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, second = (build_model("zoo:digits", seed=3).model for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = build_model("zoo:digits", seed=4).model
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_state_dicts_of_torch_are_read_without_unpickling(tmp_path: Path):
    model = zoo.build("digits")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "good.pt")
    target = zoo.build("digits")
    load_weights_(target, tmp_path / "good.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), target.parameters(), strict=True))
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(ModelError, match="plain tensors"):
        load_weights_(target, tmp_path / "whole.pt")
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "wrong.pth")
    with pytest.raises(ModelError, match="has shape"):
        load_weights_(target, tmp_path / "wrong.pth")
    torch.save({"features.0.wieght": torch.zeros(2)}, tmp_path / "names.pth")
    with pytest.raises(ModelError, match="does not fit the model"):
        load_weights_(target, tmp_path / "names.pth")


def test_timm_models_are_built_and_compressed():
    source = build_model("timm:resnet10t")
    assert source.input_shape == (3, 176, 176)
    assert source.normalisation.mean == pytest.approx((0.485, 0.456, 0.406))
    example = torch.randn(1, 3, 64, 64)
    result = compress(source.model, example, decomposition="spatial", budget=Budget(macs=0.6), calibration="none")
    assert result.after.macs <= 0.6 * result.before.macs


def test_hugging_face_models_are_built_and_compressed(tmp_path: Path):
    transformers = optional("transformers", "hf")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 99,
    }
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    model = build_model(f"hf:{tmp_path / 'bert'}").model
    inputs = {"input_ids": torch.arange(8)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    result = compress(model, inputs, decomposition="svd", budget=Budget(params=0.8))
    assert {layer.kind for layer in result.plan.decomposed} == {"Linear"}
    assert any("an embedding: left whole" in reason for reason in result.plan.skipped.values())
    with torch.no_grad():
        assert result.model(**inputs).last_hidden_state.shape == (1, 8, 32)
    with pytest.raises(ModelError, match="cannot be loaded"):
        build_model(f"hf:{tmp_path / 'nothing'}")


def test_images_are_scaled_and_normalised_and_layouts_understood(tmp_path: Path):
    x = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    np.savez(tmp_path / "last.npz", x=x, y=np.zeros(2, np.int64))
    np.savez(tmp_path / "first.npz", x=x.transpose(0, 3, 1, 2), y=np.zeros(2, np.int64))
    norm = Normalisation((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    batches = [open_dataset(f"npz:{tmp_path}/{name}.npz", (3, 4, 5), norm).batch(0, 2)[0] for name in ("last", "first")]
    assert torch.equal(*batches)
    assert batches[0][1, 2, 3, 4].item() == pytest.approx((x[1, 3, 4, 2] / 255 - 0.3) / 0.7, rel=1e-5)


def test_accuracy_counts_the_first_and_the_first_five(tmp_path: Path):
    x = torch.eye(10)[:, :, None].numpy()
    np.savez(tmp_path / "d.npz", x=x, y=np.roll(np.arange(10), 1))
    dataset = open_dataset(f"npz:{tmp_path}/d.npz", (10, 1), PLAIN)
    weight = torch.eye(10) * 2 + torch.roll(torch.eye(10), -1, 0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(10, 10, bias=False))
    model[1].weight.data = weight
    scored = accuracy(model, dataset, batch_size=3)
    assert (scored.top1, scored.examples) == (0.0, 10)
    assert scored.top5 >= 50
    model[1].weight.data = torch.roll(torch.eye(10), -1, 0)
    assert accuracy(model, dataset, batch_size=7).top1 == 100.0


def test_latency_takes_turns():
    order: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            return x

    times = latency([Named("a"), Named("b")], torch.zeros(1), rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert len(times) == 2
    assert min(times) > 0


def test_the_embedded_network_is_trained():
    model, held_out = digits()
    assert len(held_out) == 360
    assert accuracy(model, held_out).top1 > 99


def test_data_of_the_users_own(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match="no_such"):
        open_dataset("no_such:thing", (1,), PLAIN)
    with pytest.raises(DataError, match="pair"):
        open_dataset("os:getcwd", (1,), PLAIN)


def test_a_real_network_keeps_what_its_weights_allow(resnet20: nn.Module, data: Path):
    source = build_model("zoo:cifar10_resnet20")
    labelled = open_dataset(f"npz:{data}/cifar10/test.npz", (3, 32, 32), source.normalisation)
    result = compress(
        resnet20, torch.zeros(1, 3, 32, 32), decomposition="spatial", budget=Budget(macs=0.5), calibration="none"
    )
    assert accuracy(result.model, labelled).top1 >= 66
