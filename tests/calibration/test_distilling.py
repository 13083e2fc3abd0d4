"""Distillation inside `compress`: the whole network learns from the original's outputs, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankfold import Budget, DataError, TrainingError, compress
from rankfold.files.artifact import load, save
from rankfold.network.passes import joined
from rankfold.network.precision import multiplies_bfloat16
from rankfold.reports.tables import calibration
from rankfold.training import Losses, Training, Unlabelled, fine_tune
from rankfold.training.examples import score_of

EPOCHS = Training(epochs=6, batch_size=16, optimiser="adamw", rate=3e-3, weight_decay=0.0, patience=6, precision="no")


class Words(nn.Module):
    """A small language model: it is called with names, and gives an object with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 24), nn.Linear(24, 40)
        self.mlp = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24))

    def forward(self, ids: torch.Tensor, *, keep: bool = True) -> Any:
        hidden = self.embed(ids).cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None].sqrt()
        return (self.head(hidden + self.mlp(hidden)),) if keep else None


def words() -> nn.Module:
    torch.manual_seed(0)
    return Words().eval()


def rows(seed: int, count: int) -> list[dict[str, Any]]:
    drawn = torch.randint(40, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"ids": part, "keep": True} for part in drawn.split(8)]


def compressed(model: nn.Module, distil: int | Training, **options: Any) -> Any:
    chosen = {"decomposition": "svd", "budget": Budget(params=0.5), "calibration": rows(0, 192), **options}
    return compress(model, rows(1, 1)[0], distil=distil, **chosen)


def test_outputs_come_closer_on_other_inputs_and_the_original_stays():
    model = words()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, distilled = compressed(model, 0), compressed(model, EPOCHS)
    unseen = Unlabelled.of(rows(2, 64), 8)[0]
    lost = [score_of(one.model, unseen, teacher=model) for one in (plain, distilled)]
    assert lost[1] < 0.8 * lost[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert distilled.after == plain.after
    told = distilled.plan.settings["distilled"]
    assert len(told["divergence"]) == 1 + told["epochs"]
    assert min(told["divergence"]) < told["divergence"][0]
    assert "distilled, divergence from the original" in calibration(distilled.plan.settings)
    assert all(one.grad is None and one.requires_grad for one in distilled.model.parameters())


def test_it_is_deterministic_and_what_it_made_is_saved(tmp_path: Path):
    model, ids = words(), rows(3, 4)[0]
    first, second = (compressed(model, 2) for _ in range(2))
    told = first.plan.settings["distilled"]
    precision = "bf16" if multiplies_bfloat16(torch.device("cpu")) else "no"
    assert (told["batch_size"], told["precision"]) == (1, precision)
    with torch.no_grad():
        assert torch.equal(first.model(**ids)[0], second.model(**ids)[0])
        save(first, tmp_path / "small")
        assert torch.equal(load(tmp_path / "small", words())(**ids)[0], first.model(**ids)[0])


def test_weights_that_come_no_closer_are_not_kept():
    """At such a rate every step does harm."""
    model = words()
    harmful = Training(epochs=2, batch_size=16, optimiser="adamw", rate=3.0, patience=2, precision="no")
    plain, distilled = compressed(model, 0), compressed(model, harmful)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, distilled.model.state_dict()[name])
    assert "not distilled: on inputs held back it came no closer" in calibration(distilled.plan.settings)


@pytest.mark.parametrize("asked", [{"distil": 1}, {"distil": 0, "refine": 1}])
def test_without_inputs_there_is_nothing_to_learn_from(asked: dict[str, int]):
    with pytest.raises(DataError, match="refining and distilling need calibration inputs"):
        compressed(words(), calibration="none", **asked)


def test_inputs_of_unequal_shapes_stay_together_as_they_are_given():
    long = [{"ids": part["ids"][:, :7], "keep": True} for part in rows(4, 16)]
    mixed, step = Unlabelled.of([*rows(0, 176), *long], 4)
    assert (len(mixed), step) == (48, 1)
    even, step = Unlabelled.of(rows(0, 40), 16)
    assert (len(even), step) == (40, 16)
    assert torch.equal(even.batch(0, 8)[0]["ids"], rows(0, 40)[0]["ids"])
    found = compressed(words(), 1, calibration=[*long, *rows(0, 176)])
    assert found.plan.settings["distilled"]["batch_size"] == 1


def test_parts_are_joined_in_whatever_holds_them():
    x, y = torch.ones(2, 3), torch.zeros(1, 3)
    both = joined([({"a": x}, [x, torch.tensor(1)], True), ({"a": y}, [y, torch.tensor(1)], True)])
    assert torch.equal(both[0]["a"], torch.cat([x, y]))
    assert torch.equal(both[1][0], torch.cat([x, y]))
    assert both[1][1].ndim == 0
    assert both[2] is True


class Hidden(nn.Module):
    """What gives hidden states, which are no distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_outputs_that_are_no_distribution_are_compared_by_their_squares():
    torch.manual_seed(0)
    model = Hidden().eval()
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)).split(20)
    options: dict[str, Any] = {"decomposition": "svd", "budget": Budget(params=0.6), "calibration": x}
    plain, distilled = (compress(model, x[0][:1], distil=one, **options).model for one in (0, EPOCHS))
    unseen = torch.randn(100, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        lost = [float((one(unseen) - model(unseen)).square().mean()) for one in (plain, distilled)]
    assert lost[1] < 0.8 * lost[0]


def test_labels_are_not_there_to_be_learned_from():
    model = words()
    data, step = Unlabelled.of(rows(0, 32), 8)
    training = Training(epochs=1, batch_size=step, precision="no", augment="cifar")
    with pytest.raises(TrainingError, match="augment 'cifar' and cutmix 0.0 are for images"):
        fine_tune(model, data, teacher=model, training=training, losses=Losses(task=0.0))


class Residual(nn.Module):
    """A block of a small network of images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.last(self.norm(self.first(x)).relu())


def test_of_images_all_that_blocks_give_is_learned_and_norms_keep_their_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), *(Residual(12) for _ in range(3)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    ).eval()  # fmt: skip
    model[-1].weight.data *= 30
    draw = torch.Generator().manual_seed(1)
    seen, unseen = torch.rand(200, 3, 16, 16, generator=draw), torch.rand(100, 3, 16, 16, generator=draw)
    options: dict[str, Any] = {
        "decomposition": "spatial", "budget": Budget(macs=0.4), "calibration": seen.split(20), "sequential": False
    }  # fmt: skip
    plain, distilled = (compress(model, seen[:1], distil=one, **options) for one in (0, 8))
    with torch.no_grad():
        lost = [
            [
                float((part(unseen) - theirs(unseen)).square().mean())
                for theirs, part in ((model, one), (model[:4], one[:4]))
            ]
            for one in (plain.model, distilled.model)
        ]
    assert all(after < 0.7 * before for before, after in zip(*lost, strict=True)), lost
    told = distilled.plan.settings["distilled"]
    assert (told["as_evaluated"], told["augment"], told["cutmix"] > 0) == (True, "cifar", True)
    for place in (1, 2, 3):
        norms = (one.model.get_submodule(f"{place}.norm") for one in (plain, distilled))
        assert torch.equal(*(one.running_var for one in norms))
