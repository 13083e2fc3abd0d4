"""Fine-tuning: what its losses are, that it can be interrupted, and that it helps a real network."""

from __future__ import annotations

import copy
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Running, join
from torch import nn

from rankfold import Budget, TrainingError, compress
from rankfold.evaluation import accuracy
from rankfold.network.kinds import weight_of
from rankfold.plan import Plan
from rankfold.reports.demo import digits
from rankfold.sharing import place
from rankfold.sources.data import Dataset, Normalisation
from rankfold.training import Geometry, Losses, Trained, Training, checkpoints, fine_tune, loop, split
from rankfold.training.augment import AUGMENTATIONS, PADDING, boxes_of_others
from rankfold.training.distillation import Distillation
from rankfold.training.settings import rate_at

NO_TEACHER = Losses(logits=0.0)
QUICK = Training(epochs=2, batch_size=16, rate=0.01, warmup=2, precision="no")


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(12 * 16, 4),
    ).eval()  # fmt: skip


def images(count: int = 80, classes: int = 4) -> Dataset:
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, count)
    x = np.clip(rng.normal(40, 20, (count, 8, 8, 3)) + 50 * y[:, None, None, None], 0, 255).astype(np.uint8)
    return Dataset(x, y.astype(np.int64), (3, 8, 8), Normalisation((0.5,) * 3, (0.25,) * 3))


def student_of(model: nn.Module, decomposition: str = "svd") -> tuple[nn.Module, Plan]:
    result = compress(
        model, torch.zeros(1, 3, 8, 8), budget=Budget(params=0.5), decomposition=decomposition, calibration="none"
    )
    return result.model, result.plan


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


class StoppedError(Exception):
    pass


def interrupting(after: int):
    def progress(what: str, done: int, total: int, note: str = "", /) -> None:
        if what == "fine-tuning" and done == after:
            raise StoppedError

    return progress


@pytest.mark.parametrize("after", [5, 7])  # at the end of an epoch, and within the next
@pytest.mark.parametrize("options", [{"ema": 0.9}, {"optimiser": "adamw", "augment": "cifar"}], ids=["ema", "adamw"])
@pytest.mark.parametrize("decomposition", ["svd", "cp3"])
def test_a_killed_and_resumed_run_ends_with_the_same_weights(
    after: int, options: dict, decomposition: str, tmp_path: Path
):
    teacher, data = network(dropout=0.2), images()
    student, plan = student_of(teacher, decomposition)
    training = replace(QUICK, epochs=3, minutes=1e-9, **options)
    settings = {"teacher": teacher, "training": training, "plan": plan}
    whole = fine_tune(student, data, **settings, log=tmp_path / "whole.csv")
    place, log = tmp_path / "state.safetensors", tmp_path / "log.csv"
    with pytest.raises(StoppedError):
        fine_tune(student, data, **settings, checkpoint=place, log=log, progress=interrupting(after + 1))
    resumed = fine_tune(student, data, **settings, checkpoint=place, log=log, resume=True)
    assert resumed.resumed_at == after
    assert equal(whole.model, resumed.model)
    assert [one.loss for one in whole.epochs] == [one.loss for one in resumed.epochs]
    lines, other = (list(csv.DictReader(path.open())) for path in (log, tmp_path / "whole.csv"))
    assert [line["loss"] for line in lines] == [line["loss"] for line in other]
    assert [int(line["step"]) for line in lines] == list(range(1, 16))
    changed = {**settings, "training": replace(training, rate=0.5)}
    with pytest.raises(TrainingError, match="other settings"):
        fine_tune(student, data, **changed, checkpoint=place, resume=True)


def test_training_does_not_depend_on_how_factors_share_the_scale():
    teacher, data = network(), images()
    student, plan = student_of(teacher)
    uneven = copy.deepcopy(student)
    for layer in plan.decomposed:
        first, last = (uneven.get_submodule(f"{layer.name}.{stage}").weight.data for stage in (0, 1))
        first.mul_(20)
        last.div_(20)
    ends = {}
    for scaled in (True, False):
        training = replace(QUICK, weight_decay=0.0, scaled=scaled)
        for label, one in (("even", student), ("uneven", uneven)):
            ends[scaled, label] = fine_tune(one, data, teacher=teacher, plan=plan, training=training).epochs[-1].loss
    moved, unscaled = (abs(ends[scaled, "uneven"] - ends[scaled, "even"]) for scaled in (True, False))
    assert moved < 1e-4 < 1e-2 < unscaled


def test_factors_of_another_network_than_the_teacher_are_trained_by_their_own():
    original, data = network(), images()
    student, plan = student_of(original)
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)).eval()
    with pytest.raises(TrainingError, match=r"has no Conv2d of weight"):
        fine_tune(student, data, teacher=teacher, plan=plan, training=QUICK)
    settings = {"teacher": teacher, "plan": plan, "original": original}
    trained = fine_tune(student, data, **settings, training=QUICK)
    assert trained.epochs[-1].loss < trained.epochs[0].loss
    plain = fine_tune(student, data, **settings, training=replace(QUICK, scaled=False))
    assert trained.epochs[-1].loss != plain.epochs[-1].loss
    with pytest.raises(TrainingError, match=r"does not have the plan's svd of ranks"):
        fine_tune(original, data, teacher=teacher, plan=plan, original=original, training=QUICK)


def test_the_clipped_norm_is_that_of_all_scaled_steps(monkeypatch: pytest.MonkeyPatch):
    teacher, data = network(), images()
    student, plan = student_of(teacher)
    energies, gradients = [], []
    scale, step = Geometry.scale_, torch.optim.SGD.step

    def scaled(self: Geometry) -> torch.Tensor:
        energies.append(scale(self))
        return energies[-1]

    def stepped(self: torch.optim.SGD, *args: object, **kwargs: object) -> object:
        gradients.append([[one.grad.clone() for one in group["params"]] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Geometry, "scale_", scaled)
    monkeypatch.setattr(torch.optim.SGD, "step", stepped)
    for clip in (0.0, 1e-3):
        fine_tune(student, data, teacher=teacher, plan=plan, training=replace(QUICK, epochs=1, clip=clip))
    assert [layer.name for layer in plan.decomposed] == ["3", "8"]
    free, clipped = gradients[0], gradients[5]
    dense = [free[0][0], *free[1]]  # the first convolution; biases and norms
    norm = (energies[0] + sum(one.square().sum() for one in dense)).sqrt()
    for one, other in zip([*free[0], *free[1]], [*clipped[0], *clipped[1]], strict=True):
        torch.testing.assert_close(other, one * 1e-3 / norm)


def test_a_frozen_factor_stays_as_it_is():
    teacher, data = network(), images()
    student, plan = student_of(teacher, "cp3")
    assert plan.decomposed[0].name == "3"
    frozen, last = student[3][1].weight.requires_grad_(False), student[3][2].weight
    trained = fine_tune(student, data, teacher=teacher, plan=plan, training=QUICK)
    assert torch.equal(trained.model[3][1].weight, frozen)
    assert not torch.equal(trained.model[3][2].weight, last)
    assert trained.epochs[-1].loss < trained.epochs[0].loss


def test_a_run_with_scaled_gradients_is_not_resumed_with_others(tmp_path: Path):
    teacher, data, place = network(), images(), tmp_path / "state.safetensors"
    student, plan = student_of(teacher)
    fine_tune(student, data, teacher=teacher, plan=plan, training=QUICK, checkpoint=place)
    with pytest.raises(TrainingError, match="other settings"):
        fine_tune(student, data, teacher=teacher, training=QUICK, checkpoint=place, resume=True)


@pytest.mark.parametrize("copied", [True, False])  # a teacher in channels last is a copy, another shares its tensors
def test_it_leaves_student_teacher_and_random_state_alone(copied: bool):
    teacher, data = network(dropout=0.2), images()
    student, plan = student_of(teacher)
    teacher.train()
    before = copy.deepcopy((student, teacher))
    state = torch.get_rng_state()
    training, losses = replace(QUICK, channels_last=copied), Losses(weights=1.0, outputs=1.0)
    trained = fine_tune(student, data, teacher=teacher, plan=plan, training=training, losses=losses)
    assert teacher.training
    assert all(one.requires_grad and one.grad is None for one in teacher.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert equal(student, before[0])
    assert equal(teacher, before[1])
    assert not equal(student, trained.model)
    assert not trained.model.training
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))


@pytest.mark.parametrize("decomposition", ["none", "svd", "cp3"])
def test_a_run_that_diverges_says_so_and_keeps_its_checkpoint(decomposition: str, tmp_path: Path):
    teacher, data = network(), images()
    student, plan = student_of(teacher, decomposition) if decomposition != "none" else (network(), None)
    place = tmp_path / "state.safetensors"
    wild = replace(QUICK, epochs=8, rate=1e18, clip=0.0, warmup=40)
    with pytest.raises(TrainingError, match=r"not finite at step .* learning rate") as failure:
        fine_tune(student, data, teacher=teacher, plan=plan, training=wild, checkpoint=place)
    assert ("is from before" in str(failure.value)) == place.exists()
    if place.exists():
        kept = checkpoints.read(place).groups["model"]
        assert all(bool(tensor.isfinite().all()) for tensor in kept.values())


def test_weights_that_are_not_finite_do_not_replace_a_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Finite losses, but the step of the second epoch's end ruins a weight."""
    place = tmp_path / "state.safetensors"
    step = torch.optim.SGD.step
    counted = []

    def ruining(self: torch.optim.SGD, *args: object, **kwargs: object) -> object:
        found = step(self, *args, **kwargs)
        counted.append(1)
        if len(counted) == 10:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return found

    monkeypatch.setattr(torch.optim.SGD, "step", ruining)
    with pytest.raises(TrainingError, match="not finite at step 10"):
        fine_tune(network(), images(), losses=Losses(logits=0.0), training=QUICK, checkpoint=place)
    assert checkpoints.read(place).facts["step"] == 5


def test_patience_ends_a_run_that_gets_no_better_and_keeps_its_best_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scores, judged = iter([40.0, 50.0, 60.0, 55.0, 60.0, 70.0, 80.0]), []

    def score(model: nn.Module, data: object, *, teacher: nn.Module | None) -> float:
        judged.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(loop, "score_of", score)
    settings = replace(QUICK, epochs=6, patience=2)
    options = {"losses": Losses(logits=0.0), "training": settings, "held_out": images(20)}
    trained = fine_tune(network(), images(), **options, checkpoint=tmp_path / "state.safetensors")
    assert trained.started == 40
    assert [one.top1 for one in trained.epochs] == [50, 60, 55, 60]
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, judged[2][name])
    resumed = fine_tune(network(), images(), **options, checkpoint=tmp_path / "state.safetensors", resume=True)
    assert resumed.epochs == trained.epochs
    assert resumed.started == trained.started
    assert equal(resumed.model, trained.model)
    with pytest.raises(TrainingError, match="patience needs examples that are held out"):
        fine_tune(network(), images(), losses=Losses(logits=0.0), training=settings)
    with pytest.raises(TrainingError, match="patience -1 is a number of epochs"):
        Training(patience=-1)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path):
    place = tmp_path / "state.safetensors"
    fine_tune(network(), images(), losses=Losses(logits=0.0), training=QUICK, checkpoint=place)
    other, _ = student_of(network())
    with pytest.raises(TrainingError, match="of another network"):
        fine_tune(other, images(), losses=Losses(logits=0.0), training=QUICK, checkpoint=place, resume=True)


def test_losses_by_layer_are_those_of_the_paper():
    teacher, data = network(), images()
    student, plan = student_of(teacher)
    x, y = data.batch(0, 16)
    same = compress(teacher, x[:1], budget=Budget(params=1.0), calibration="none")
    sums, means = (
        Distillation(
            Losses(task=0.0, logits=1.0, temperature=2.0, weights=0.5, outputs=0.25, reduction=reduction),
            student,
            teacher,
            plan,
        )(student, x, y)
        for reduction in ("sum", "mean")
    )
    assert set(sums) == {"logits", "weights", "outputs"}
    expected = entries = 0.0
    for layer in plan.decomposed:
        wide, first, last = (
            m.get_submodule(p)
            for m, p in ((teacher, layer.name), (student, f"{layer.name}.0"), (student, f"{layer.name}.1"))
        )
        product = last.weight.flatten(1) @ first.weight.flatten(1)
        distance = (weight_of(wide).flatten() - product.flatten()).square()
        expected, entries = expected + float(distance.sum().detach()), entries + float(distance.mean().detach())
    assert float(sums["weights"].detach()) == pytest.approx(0.5 * expected, rel=1e-4)
    assert float(means["weights"].detach()) == pytest.approx(0.5 * entries / len(plan.decomposed), rel=1e-4)
    own = (student(x) / 2).softmax(-1).log(), (teacher(x) / 2).softmax(-1)
    divergence = 4 * (own[1] * (own[1].log() - own[0])).sum(-1).mean()
    assert float(sums["logits"].detach()) == pytest.approx(float(divergence.detach()), rel=1e-4)
    nothing = Distillation(Losses(task=0.0, weights=1.0, outputs=1.0), same.model, teacher, same.plan)
    if same.plan.decomposed:
        assert all(float(term.detach()) < 1e-8 for term in nothing(same.model, x, y).values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Losses(task=0.0, logits=0.0), "every loss has weight zero"),
        (lambda: Losses(logits=-1.0), "must not be negative"),
        (lambda: Losses(reduction="max"), "neither 'mean' nor 'sum'"),
        (lambda: Training(optimiser="lion"), "allowed: sgd, adamw"),
        (lambda: Training(ema=1.0), "decay per step"),
        (lambda: Training(cutmix=1.5), "cutmix 1.5 is a share"),
        (
            lambda: fine_tune(network(), images(), losses=NO_TEACHER, training=replace(QUICK, cutmix=0.5)),
            "cutmix is for training without labels",
        ),
        (lambda: Training(epochs=0), "must be positive"),
        (lambda: Training(damping=-1.0), "damping -1.0 must be zero"),
        (lambda: Training(clip=float("nan")), "clip nan must be zero"),
        (lambda: fine_tune(network(), images(), training=QUICK, losses=Losses(logits=1.0)), "need a teacher"),
        (
            lambda: fine_tune(network(), images(), teacher=network(), training=QUICK, losses=Losses(weights=1.0)),
            "the plan of its layers",
        ),
        (
            lambda: fine_tune(network(), images(), plan=student_of(network())[1], losses=NO_TEACHER, training=QUICK),
            "give it as `original`",
        ),
        (lambda: fine_tune(network(), images(8), losses=Losses(logits=0.0)), "change the batch size"),
        (lambda: fine_tune(network(), images(), losses=Losses(logits=0.0), resume=True), "nothing to resume from"),
        (lambda: split(images(), 80), "cannot be held out"),
    ],
)
def test_what_does_not_fit_is_refused(make, message: str):
    with pytest.raises(TrainingError, match=message):
        make()


def test_the_loss_by_block_is_the_mean_of_their_relative_errors():
    """Convolutions count by what the batch norm behind them gives."""
    teacher, data = network(), images()
    for norm in (teacher[1], teacher[4]):
        norm.running_var[::2] *= 9
        norm.running_mean += 0.5
    student, plan = student_of(teacher)
    x, y = data.batch(0, 32)
    losses = Losses(task=0.0, logits=0.0, blocks=0.5)
    found = Distillation(losses, student, teacher, plan, [x[:16], x[16:]])(student, x, y)
    expected = []
    for name in plan.touched:
        place = int(name) + (2 if isinstance(teacher[int(name)], nn.Conv2d) else 1)
        theirs, own = teacher[:place](x), student[:place](x)
        expected.append(float(((own - theirs).square().sum() / theirs.square().sum()).detach()))
    assert len(expected) > 1
    assert set(found) == {"blocks"}
    assert float(found["blocks"].detach()) == pytest.approx(0.5 * sum(expected) / len(expected), rel=1e-4)


def test_a_network_without_blocks_is_compared_as_a_whole():
    """The one layer that is changed is called twice."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x).relu())

    teacher, x = Twice().eval(), torch.randn(4, 12)
    small = compress(teacher, x[:1], decomposition="svd", budget=Budget(params=0.5), calibration="none")
    losses = Losses(task=0.0, logits=0.0, blocks=1.0)
    (found,) = Distillation(losses, small.model, teacher, small.plan, [x])(small.model, x, x).values()
    expected = (small.model(x) - teacher(x)).square().sum() / teacher(x).square().sum()
    torch.testing.assert_close(found, expected)


def test_a_network_is_trained_as_it_is_evaluated_where_that_is_asked_for():
    """Batch norms keep their statistics, and without dropout two seeds that see whole batches end alike."""
    teacher = network(dropout=0.5)
    student, plan = student_of(teacher)
    training = Training(epochs=1, batch_size=80, rate=0.01, precision="no", as_evaluated=True)
    options = {"teacher": teacher, "plan": plan, "losses": Losses(task=0.0, blocks=1.0)}
    one, other = (
        fine_tune(student, images(), training=replace(training, seed=seed), **options).model for seed in (0, 1)
    )
    statistics = {name: tensor for name, tensor in student.named_buffers() if "running" in name}
    assert statistics
    for name, tensor in statistics.items():
        assert torch.equal(one.get_buffer(name), tensor)
    for (name, a), b, before in zip(one.named_parameters(), other.parameters(), student.parameters(), strict=True):
        assert not torch.equal(a, before), name
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    usual = fine_tune(student, images(), training=replace(training, as_evaluated=False), **options).model
    assert not torch.equal(usual.get_buffer("1.running_mean"), statistics["1.running_mean"])


def test_without_labels_only_the_teacher_counts(tmp_path: Path):
    teacher, data = network(), images()
    student, _ = student_of(teacher)
    shuffled = replace(data, y=data.y[::-1].copy())
    settings = {"teacher": teacher, "training": QUICK, "losses": Losses(task=0.0)}
    one, other = (fine_tune(student, d, **settings).model for d in (data, shuffled))
    assert equal(one, other)


def test_the_rate_warms_up_and_falls_to_zero():
    training = Training(rate=0.4, warmup=10)
    rates = [rate_at(training, step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[9] == max(rates) == pytest.approx(0.4)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def test_crops_of_small_images_are_shifts_of_them_padded_with_black():
    x = torch.arange(1, 1 + 16 * 3 * 8 * 8, dtype=torch.float32).reshape(16, 3, 8, 8)
    black = torch.tensor([-1.0, -2.0, -3.0])
    found = AUGMENTATIONS["cifar"](x, black, torch.Generator().manual_seed(0))
    again = AUGMENTATIONS["cifar"](x, black, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)
    padded = black.reshape(1, 3, 1, 1).expand(16, 3, 8 + 2 * PADDING, 8 + 2 * PADDING).clone()
    padded[:, :, PADDING:-PADDING, PADDING:-PADDING] = x
    mirrored = 0
    for image, source in zip(found, padded, strict=True):
        crops = source.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        plain, turned = (bool((crops == one).flatten(1).all(1).any()) for one in (image, image.flip(-1)))
        assert plain or turned
        mirrored += turned and not plain
    assert 0 < mirrored < 16


def test_crops_of_large_images_keep_shape_and_range():
    x = torch.rand(8, 3, 20, 24, generator=torch.Generator().manual_seed(1))
    found = AUGMENTATIONS["imagenet"](x, torch.zeros(3), torch.Generator().manual_seed(0))
    assert found.shape == x.shape
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert not torch.equal(found, x)
    flat = torch.full((4, 3, 9, 9), 0.3)
    torch.testing.assert_close(AUGMENTATIONS["imagenet"](flat, torch.zeros(3), torch.Generator()), flat)


def test_boxes_are_those_of_other_images_in_a_share_of_the_batches():
    """Every image has a value of its own, so that what is in it tells where it is from."""
    x = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 2, 9, 12).clone()
    generator, changed, areas = torch.Generator().manual_seed(0), 0, []
    for _ in range(400):
        mixed = boxes_of_others(x, 0.25, generator)
        inside = (mixed != x).any(0)[0]
        changed += bool(inside.any())
        if not inside.any():
            continue
        rows, columns = inside.any(1), inside.any(0)
        assert torch.equal(inside, rows[:, None] & columns)
        box = mixed[:, :, rows][..., columns]
        assert all(len(one.unique()) == 1 for one in box)
        assert torch.equal(box[:, 0, 0, 0].sort().values, x[:, 0, 0, 0])
        areas.append(float(inside.float().mean()))
    assert changed / 400 == pytest.approx(0.25, abs=0.06)
    assert min(areas) < 0.2
    assert max(areas) > 0.7
    assert torch.equal(boxes_of_others(x, 0.0, generator), x)


@pytest.mark.parametrize("decomposition", ["spatial", "cp3"])
def test_a_real_network_recovers(decomposition: str):
    """The embedded digits network at a sixth of its MACs, from its training digits; scored on those held out."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    train_test_split = pytest.importorskip("sklearn.model_selection").train_test_split
    model, held_out = digits()
    known = load_digits()
    pixels = (known.images * 255 / 16).round().astype(np.uint8)
    x, _, y, _ = train_test_split(pixels, known.target, test_size=360, stratify=known.target, random_state=0)
    data = replace(held_out, x=x, y=y.astype(np.int64))
    result = compress(
        model, torch.zeros(1, 1, 8, 8), decomposition=decomposition, budget=Budget(macs=0.16), calibration="none"
    )
    before = accuracy(result.model, held_out).top1
    training, chosen = split(data, 200)
    assert (len(training), len(chosen)) == (1237, 200)
    trained = fine_tune(
        result.model,
        training,
        teacher=model,
        plan=result.plan,
        held_out=chosen,
        training=Training(epochs=4, batch_size=64),
    )
    after = accuracy(trained.model, held_out).top1
    assert after > max(before + 20, 96)
    assert trained.epochs[-1].top1 == accuracy(trained.model, chosen).top1
    assert trained.epochs[-1].loss < trained.epochs[0].loss


def _trained(out: Path, rank: int, processes: int) -> None:
    """Writes what the first of so many processes ends with."""
    if processes > 1:
        join(out.with_suffix(".store"), rank, processes)
    teacher, data = network(), images()
    losses = Losses(weights=0.5, outputs=0.5, blocks=0.5)
    training = Training(epochs=2, batch_size=16, rate=0.05, warmup=2, precision="no", augment="cifar", ema=0.9)
    states = {}
    for decomposition in ("svd", "cp3"):
        student, plan = student_of(teacher.float(), decomposition)
        found = fine_tune(
            student.double(), data, teacher=teacher.double(), plan=plan, losses=losses, held_out=data, training=training
        )
        states |= {f"{decomposition} {name}": tensor for name, tensor in found.model.state_dict().items()}
    assert place() == (rank, processes)
    if not rank:
        torch.save(states, out)


def test_two_processes_end_where_one_does(tmp_path: Path):
    """Gloo over loopback; the same global batches, so the same result up to the order of summation."""
    one, *two = (Running(tmp_path, _trained, tmp_path / f"{n}.pt", rank, n) for n in (1, 2) for rank in range(n))
    for running in (one, *two):
        done = running.finished()
        assert done.returncode == 0, done.told[-2000:]
    alone, together = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5)


def test_history_is_a_plain_record():
    trained = fine_tune(network(), images(), losses=Losses(logits=0.0), training=QUICK, held_out=images(20))
    assert isinstance(trained, Trained)
    assert len(trained.epochs) == 2
    assert trained.precision == "no"
    assert all(0 <= one.top1 <= 100 and one.seconds > 0 for one in trained.epochs)
