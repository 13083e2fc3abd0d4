"""Refining by blocks: outputs come closer on inputs it has not seen, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankfold import ArtifactError, Budget, BudgetError, DataError, ModelError, UnknownNameError, compress, recovery
from rankfold.calibration import Refining, refining
from rankfold.calibration.refining import refine_
from rankfold.files.artifact import load, save
from rankfold.network.blocks import norms_behind
from rankfold.network.copies import duplicate
from rankfold.reports.demo import digits
from rankfold.reports.tables import calibration
from rankfold.training.augment import with_copies


class Block(nn.Module):
    """A residual block that keeps what it is given in a cache it is called with, and works in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, *, cache: list[Any]) -> torch.Tensor:
        cache.append(x)
        hidden = torch.relu_(self.first(nn.functional.layer_norm(x, x.shape[-1:])))
        return x.add_(self.second(hidden) / len(cache))


class Stack(nn.Module):
    """Blocks in a row, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(6, 16), nn.ModuleList(Block(16) for _ in range(3))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, cache = self.stem(x), list[Any]()
        for block in self.blocks:
            x = block(x, cache=cache)
        return self.head(x)


def made() -> nn.Module:
    torch.manual_seed(0)
    return Stack().eval()


def inputs(seed: int, count: int = 160) -> torch.Tensor:
    return torch.randn(count, 5, 6, generator=torch.Generator().manual_seed(seed)).cumsum(1)


def distance(model: nn.Module, student: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - student(x)).square().sum() / model(x).square().sum())


def compressed(model: nn.Module, refine: int | Refining, decomposition: Any = "svd", *, sequential: bool = True) -> Any:
    return compress(
        model,
        inputs(2, 1),
        decomposition=decomposition,
        budget=Budget(params=0.5),
        calibration=[inputs(0)],
        refine=refine,
        sequential=sequential,
    )


@pytest.mark.parametrize("decomposition", ["svd", ["svd", "interpolative"]])
def test_it_comes_closer_on_other_inputs_and_leaves_the_original_alone(decomposition: Any) -> None:
    model = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, refined = compressed(model, 0, decomposition), compressed(model, 16, decomposition)
    assert distance(model, refined.model, inputs(1)) < 0.9 * distance(model, plain.model, inputs(1))
    apart = (compressed(model, epochs, decomposition, sequential=False).model for epochs in (8, 0))
    fitted, layerwise = (distance(model, one, inputs(1)) for one in apart)
    assert fitted < 0.8 * layerwise
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert refined.after == plain.after
    blocks = refined.plan.settings["refined_blocks"]
    assert {"blocks.0", "blocks.1", "blocks.2"} <= set(blocks)
    assert all(after <= before for before, after in blocks.values())
    flags = [[one.requires_grad for one in result.model.parameters()] for result in (plain, refined)]
    assert flags[0] == flags[1]
    assert all(one.grad is None for one in refined.model.parameters())


def test_blocks_begin_with_the_closer_of_what_they_were_and_are() -> None:
    """In front of a block that is refined there is less to make up for than fits in forward order did."""
    model, held = made(), [inputs(3, 40)]
    plain = compressed(model, 0)
    student, plan = plain.model, plain.plan
    met: list[list[float]] = []

    def begun(tensors: Sequence[torch.Tensor], error: Callable[[], float]) -> None:
        own, errors = [one.detach().clone() for one in tensors], [error()]
        with torch.no_grad():
            for tensor in tensors:
                tensor *= 0.98
            errors.append(error())
            for tensor, value in zip(tensors, own, strict=True) if errors[0] <= errors[1] else ():
                tensor.copy_(value)
        met.append(errors)

    found = refine_(student, model, plan, [inputs(0)], held, refining=Refining(1), begun=begun)
    assert [one.before for one in found] == [min(both) for both in met]


def test_it_is_deterministic_and_what_it_made_is_saved(tmp_path: Path) -> None:
    model = made()
    first, second = compressed(model, 3), compressed(model, 3)
    x = inputs(1)
    with torch.no_grad():
        assert torch.equal(first.model(x), second.model(x))
        save(first, tmp_path / "small")
        assert torch.equal(load(tmp_path / "small", made())(x), first.model(x))


def test_a_block_that_gains_nothing_on_held_inputs_stays_as_it_was() -> None:
    """The student is the original itself: it cannot get better, only as good again."""
    model = made()
    plan, student = compressed(model, 0).plan, duplicate(model)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = refine_(student, model, plan, [inputs(0)], [inputs(3, 40)], refining=Refining(2))
    assert found
    assert all(one.after == one.before for one in found)
    assert refine_(student, model, plan, [inputs(0)], [], refining=Refining(2)) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_nothing_is_refined_where_no_inputs_are_held_back() -> None:
    """There are too few of them, and nothing tells whether descent helps."""
    result = compress(made(), inputs(0)[:1], budget=Budget(params=0.6), calibration=[inputs(0)[:5]], refine=2)
    assert result.plan.settings["refined_blocks"] == {}


def test_inputs_that_wait_in_memory_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    import rankfold.calibration.in_step as in_step

    model, plain = made(), compressed(made(), 0)
    monkeypatch.setattr(in_step, "LARGEST_SHARE", 1)
    found = refine_(plain.model, model, plain.plan, [inputs(0)], [inputs(3, 40)], refining=Refining(1))
    assert {"blocks.0", "blocks.1", "blocks.2"} <= {one.name for one in found}


def test_blocks_are_taken_back_where_the_network_is_farther_from_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    monkeypatch.setattr(recovery, "FEWEST", 10**6)  # forward order is not judged
    plain = compressed(model, 0)
    monkeypatch.setattr(recovery, "is_farther", lambda *given: True)
    refused = compressed(model, 3)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, refused.model.state_dict()[name])
    assert refused.plan.settings["refined_blocks"] == {}
    assert calibration(refused.plan.settings).endswith(f"; not refined: {recovery.FARTHER}")


def test_given_blocks_are_refined_and_no_others() -> None:
    model = made()
    result = compressed(model, Refining(2, blocks=("blocks.1", "hea*")))
    assert set(result.plan.settings["refined_blocks"]) == {"blocks.1", "head"}
    assert result.plan.settings["refine_blocks"] == ["blocks.1", "hea*"]
    with pytest.raises(UnknownNameError, match=r"block 'block\.1' matches nothing; nearest: blocks\.1"):
        compressed(model, Refining(2, blocks=("block.1",)))
    with pytest.raises(ModelError, match="blocks is no block: it is not called just once"):
        compressed(model, Refining(2, blocks=("blocks",)))


def test_targets_may_be_what_the_original_gives_on_the_same_inputs() -> None:
    model = made()
    shares = (0.0, 0.5, 1.0)
    found = {share: compressed(model, Refining(4, mixed=share), sequential=False) for share in shares}
    assert found[0.5].plan.settings["refine_mixed"] == 0.5
    lost = {share: distance(model, result.model, inputs(1)) for share, result in found.items()}
    assert len(set(lost.values())) == 3
    before = distance(model, compressed(model, 0, sequential=False).model, inputs(1))
    assert all(one < before for one in lost.values())
    plain = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    narrow = compressed(plain, Refining(2, mixed=0.5), "interpolative")  # the original cannot take what its layers get
    assert narrow.plan.narrowings
    for wrong in ({"mixed": 1.5}, {"batch_size": 0}):
        with pytest.raises(BudgetError, match="refining takes|share of mixed"):
            Refining(2, **wrong)
    with pytest.raises(BudgetError, match="0 for none"):
        compressed(model, -1)


def test_a_run_that_was_killed_goes_on_from_its_last_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, straight, calls = made(), compressed(made(), 3), []
    work = refining._descended

    def dying(*args: Any) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return work(*args)

    monkeypatch.setattr(refining, "_descended", dying)
    with pytest.raises(KeyboardInterrupt):
        compressed(model, Refining(3, checkpoint=tmp_path / "work"))
    again = compressed(model, Refining(3, checkpoint=tmp_path / "work"))
    assert len(calls) == len(straight.plan.settings["refined_blocks"]) + 1
    assert again.plan == straight.plan
    with torch.no_grad():
        assert torch.equal(again.model(inputs(1)), straight.model(inputs(1)))
    with pytest.raises(ArtifactError, match="of another run"):
        compressed(model, Refining(4, checkpoint=tmp_path / "work"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file; a checkpoint"):
        Refining(3, checkpoint=tmp_path / "file")
    next((tmp_path / "work").glob("block-*")).write_bytes(b"cut off")
    with pytest.raises(ArtifactError, match="cannot be read"):
        compressed(model, Refining(3, checkpoint=tmp_path / "work"))


def test_convolutions_in_front_of_batch_norms_are_refined_together_with_them() -> None:
    """The digits network is a plain row: what its norms hold was corrected, and no convolution is to be as before."""
    model, scored = digits()
    seen = [scored.batch(start, start + 20)[0] for start in range(0, 200, 20)]
    options: dict[str, Any] = {"decomposition": "spatial", "budget": Budget(macs=0.12), "calibration": seen}
    x = scored.batch(200, 360)[0]
    plain = compress(model, x[:1], **options)
    refined = duplicate(plain.model)
    blocks = refine_(refined, model, plan=plain.plan, batches=seen[2:], held=seen[:2], refining=Refining(6))
    assert {one.name for one in blocks} >= {"features.3", "features.7", "features.10"}
    assert distance(model, refined, x) < 1.2 * distance(model, plain.model, x)
    found = norms_behind(model, ["features.0", "features.3", "features.10"], x[:1])
    assert found == {"features.0": "features.1", "features.3": "features.4", "features.10": "features.11"}


def test_norms_count_only_where_they_take_what_a_block_gives_and_in_its_order() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])
            self.crossed = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            one, two = self.one(x), self.two(x)
            if self.crossed:
                two = self.norms[1](two)
                return self.norms[0](one) + two
            return self.norms[0](one) + self.norms[1](two.relu())

    model, x = Rows().eval(), torch.randn(3, 4)
    assert norms_behind(model, ["two"], x) == {}
    assert norms_behind(model, ["one"], x) == {"one": "norms.0"}
    model.crossed = True
    assert norms_behind(model, ["one", "two"], x) == {}


def test_copies_of_images_are_refined_on_as_well() -> None:
    """Moved and mirrored, after the images themselves; a plan tells how many."""
    images = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    more = with_copies(images, 2)
    assert len(more) == 18
    assert all(torch.equal(one, other) for one, other in zip(more, images, strict=False))
    assert not any(torch.equal(one, other) for one, other in zip(more[6:], images * 2, strict=True))
    assert all(one.amin() >= torch.stack(images).amin() for one in more)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 9)
    )
    plain, moved = (
        compress(
            model, images[0][:1], decomposition="svd", budget=Budget(params=0.5), calibration=images, refine=refining
        )
        for refining in (2, Refining(2, copies=2))
    )
    assert moved.plan.settings["refine_copies"] == 2
    assert "refine_copies" not in plain.plan.settings
    assert not torch.equal(moved.model(images[0]), plain.model(images[0]))
    with pytest.raises(DataError, match="copies are of images"):
        compressed(made(), Refining(1, copies=1))
    with pytest.raises(BudgetError, match="of copies, 0 for none"):
        Refining(1, copies=-1)
