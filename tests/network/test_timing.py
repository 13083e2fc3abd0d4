"""Times: those of operations alone, of layers' forms between them, and of a network in turns; and limits on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from cases import BATCHED, NAMES, Case  # type: ignore[import-not-found]
from command_line import run  # type: ignore[import-not-found]
from torch import nn

from rankfold import Budget, BudgetError, ModelError, compress, punctual
from rankfold.budget import Cost
from rankfold.decompositions import wiring_of
from rankfold.network.channels import find_channels
from rankfold.network.factorised import Factorised
from rankfold.network.finding import find_layers
from rankfold.network.kinds import factorised, stage_weights
from rankfold.network.layouts import empty_factors
from rankfold.network.timing import context
from rankfold.network.timing.context import timed
from rankfold.network.timing.operations import Operation, Stopwatch
from rankfold.network.timing.stages import LADDER, LayerTimes
from rankfold.network.timing.turns import latency
from rankfold.plan import Plan

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short_and_by_itself(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(context, "SECONDS", 0.4)
    monkeypatch.setattr(punctual, "SECONDS", 0.6)


class Images(nn.Module):
    """Convolutions that are worth measuring, one of them between hidden channels, and one that strides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 96, 3, padding=1)
        self.second = nn.Conv2d(96, 96, 3, padding=1)
        self.norm = nn.BatchNorm2d(96)
        self.third = nn.Conv2d(96, 128, 3, stride=2, padding=1)
        self.last = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.second(torch.relu(self.first(x)))))
        return self.last(self.third(x).relu().mean((2, 3)))


def of_layer(module: nn.Module, shape: tuple[int, ...]) -> LayerTimes:
    (layer,) = find_layers(nn.Sequential(module), torch.randn(shape)).found
    return LayerTimes(module, layer.shape, Stopwatch(CPU), channels_last=False)


def stock_layers(stages: nn.Module, x: torch.Tensor) -> list[Operation]:
    """The stock layers of a stand-in on some inputs, as operations."""
    found: list[Operation] = []

    def seen(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        (given,) = args
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or "Transpose" in type(module).__name__:
            axes = 0 if isinstance(module, nn.Linear) else given.ndim - 2
            options = {}
            if axes:
                options = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
                options["kernel"] = module.kernel_size
                if "Transpose" in type(module).__name__:
                    options["output_padding"] = module.output_padding
            channels = (module.in_channels, module.out_channels) if axes else (module.in_features, module.out_features)
            sizes = tuple(given.shape[2:]) if axes else ()
            batch = given.shape[0] if axes else given.numel() // given.shape[-1]
            found.append(Operation(type(module).__name__, batch, *channels, sizes=sizes, **options))

    for module in stages.modules():
        module.register_forward_pre_hook(seen)
    stages(x)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", BATCHED, ids=[case.label for case in BATCHED])
def test_the_operations_that_are_timed_are_those_that_run(case: Case, name: str) -> None:
    times = of_layer(case.module, case.inputs)
    wiring = wiring_of(name, times.whole)
    ranks = [max(1, int(rank) // 2) for rank in wiring.largest_ranks(times.whole, [2] * len(wiring.bonds))]
    weights = stage_weights(case.module, wiring, empty_factors(times.whole, wiring, ranks))
    made = factorised(case.module, wiring, ranks, weights)
    (call,) = times.whole.calls
    planned = [geometry.operation(counts) for geometry, counts in times._factors(times.whole, wiring, ranks, call)]
    ran = stock_layers(made, *case.arguments())
    assert planned == ran
    for operation in planned:
        assert operation.module(CPU)(operation.input(CPU)) is not None
    dense = [geometry.operation(counts) for geometry, counts in times._dense(times.whole, call)]
    assert len(dense) == 1
    assert dense[0].module(CPU)(dense[0].input(CPU)).numel() == case.module(*case.arguments()).numel()


def test_between_measured_sizes_times_are_linear() -> None:
    times = of_layer(nn.Conv2d(200, 100, 1), (1, 200, 6, 6))
    watch = times.watch
    watch.of = lambda operation: 3.0 * operation.inputs * operation.outputs + 7.0 * operation.inputs  # type: ignore[method-assign]
    for inputs, outputs in ((200, 100), (120, 100), (199, 57), (13, 5), (1, 1)):
        shape = times.whole.narrowed(outputs / 100, inputs / 200)
        assert times(shape) == pytest.approx(3 * inputs * outputs + 7 * inputs, abs=1)
    wiring = wiring_of("svd", times.whole)
    ranks = np.array([1, 17, 64, 99])
    expected = [3 * (200 * r + r * 100) + 7 * (200 + r) for r in ranks]
    assert times(times.whole, wiring, [ranks]) == pytest.approx(expected, abs=1)
    assert times.calibrated(2 * times.alone())(times.whole) == pytest.approx(2 * times(times.whole), abs=2)


def test_only_sizes_of_the_ladder_and_the_layers_own_are_measured() -> None:
    times = of_layer(nn.Linear(190, 77), (4, 190))
    wiring = wiring_of("svd", times.whole)
    times(times.whole, wiring, [np.arange(1, 55)])
    measured = [json.loads(key) for key in times.watch.known]
    assert {one["inputs"] for one in measured} | {one["outputs"] for one in measured} <= {*LADDER, 190, 77}
    assert times.watch.measured < 40


def test_what_was_measured_is_kept_for_the_next_time() -> None:
    watch = Stopwatch.opened(CPU)
    operation = Operation("Linear", 8, 32, 16)
    taken = watch.of(operation)
    watch.save()
    again = Stopwatch.opened(CPU)
    assert again.of(operation) == taken
    assert again.measured == 0
    assert watch.file is not None
    watch.file.write_text("{ this was cut off")
    assert Stopwatch.opened(CPU).known == {}


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    watch = Stopwatch(CPU, blocked / "times.json")
    watch.of(Operation("Linear", 2, 4, 4))
    watch.save()


def test_parts_of_a_network_take_no_longer_than_the_whole() -> None:
    model, x = Images().eval(), torch.randn(2, 3, 32, 32)
    layers = find_layers(model, x)
    sets = find_channels(model, x, layers.found, layers.skipped).found
    found = timed(model, model, x, layers.found, sets)
    assert all(one.dense.latency > 0 for one in found.layers)
    assert any(one.through.latency > 0 for one in found.sets)
    parts = sum(one.dense.latency for one in found.layers) + sum(one.through.latency for one in found.sets)
    assert parts <= found.total * 1.001
    largest = max(found.layers, key=lambda one: one.dense.latency)
    assert largest.name == "second"


def test_lookups_have_no_times() -> None:
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 8))
    tokens = torch.randint(50, (2, 7))
    layers = find_layers(model, tokens)
    found = timed(model, model, tokens, layers.found, ())
    assert [one.name for one in found.layers] == ["1"]
    assert "Embedding" in found.untimed["0"]


def test_a_limit_on_the_latency_was_measured_to_hold() -> None:
    model, x = Images().eval(), torch.randn(4, 3, 32, 32)
    batches = [torch.randn(32, 3, 16, 16) for _ in range(4)]
    result = compress(
        model,
        x,
        decomposition=["svd", "interpolative"],
        budget=Budget(latency=0.8),
        calibration=batches,
        sequential=False,
    )
    turns = result.plan.settings["latency_turns_ms"]
    assert 0 < result.after.latency <= 0.8 * result.before.latency
    assert any(round(result.after.latency / 1e6, 4) == measured for _, measured in turns)
    assert result.plan.settings["timed"]["threads"] == torch.get_num_threads()
    assert result.plan.settings["budget"] == {"latency": 0.8}
    assert Stopwatch.opened(CPU).known
    for layer in result.plan.layers:
        assert layer.after.latency <= layer.before.latency
        assert not layer.ranks or all(rank % 8 == 0 or rank < 32 for rank in layer.ranks)
    for one in result.plan.narrowings:
        assert len(one.kept) % 8 == 0
    before, after = latency((model, result.model), x, rounds=15)
    assert after < before


def test_a_limit_for_a_compiled_model_is_on_the_time_of_compiled_networks() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    x = torch.randn(64, 512)
    compiled = cast(nn.Module, torch.compile(model))
    result = compress(compiled, x, decomposition="svd", budget=Budget(latency=0.8), calibration="none")
    assert result.plan.settings["timed"]["compiled"] is True
    assert 0 < result.after.latency <= 0.8 * result.before.latency
    assert type(result.model) is nn.Sequential
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(result.model)(x), result.model(x))


def test_a_model_that_cannot_be_compiled_is_not_timed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, **_: object) -> object:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ModelError, match=r"cannot be compiled here \(no compiler found\).*C\+\+"):
        latency([nn.Linear(4, 4)], torch.randn(1, 4), compiled=True)


def test_later_plans_are_predicted_by_what_the_first_was_off_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of layers' times that are a third too low are told from the second plan on."""
    model, x = Images().eval(), torch.randn(4, 3, 32, 32)

    def sums(models: Sequence[nn.Module], *_: object, **__: object) -> tuple[float, ...]:
        return tuple(1e-6 * taken[id(one)] for one in models)

    taken: dict[int, float] = {}

    def made(_: nn.Module, plan: Plan) -> nn.Module:
        student = nn.Identity()
        taken[id(student)] = 1.5 * plan.after.latency
        kept.append(student)
        taken[id(model)] = plan.before.latency
        return student

    kept: list[nn.Module] = []
    monkeypatch.setattr(punctual, "rehearsed", made)
    monkeypatch.setattr(punctual, "latency", sums)
    result = compress(model, x, decomposition="svd", budget=Budget(latency=0.8), calibration="none")
    first, *later = result.plan.settings["latency_turns_ms"]
    assert first[0] / first[1] == pytest.approx(1 / 1.5, rel=1e-3)
    assert later
    for predicted, measured in later:
        assert predicted == pytest.approx(measured, rel=1e-3)


def test_a_limit_that_no_plan_keeps_names_the_fastest() -> None:
    model, x = Images().eval(), torch.randn(1, 3, 32, 32)
    with pytest.raises(BudgetError, match=r"smallest feasible one is latency=0\.\d+ \([\d.]+ ms\)"):
        compress(model, x, decomposition="svd", budget=Budget(latency="1us"), calibration="none")


def test_latency_and_macs_can_be_limited_together() -> None:
    model, x = Images().eval(), torch.randn(2, 3, 32, 32)
    budget = Budget(latency=0.9, macs=0.5, params=0.9)
    result = compress(model, x, decomposition="svd", budget=budget, calibration="none")
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.after.latency <= 0.9 * result.before.latency


def test_weights_stay_channels_last() -> None:
    model = Images().eval().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 24, 24).contiguous(memory_format=torch.channels_last)
    for decomposition in ("tucker", "interpolative"):
        made = compress(model, x[:1], decomposition=decomposition, budget=Budget(macs=0.6), calibration=[x]).model
        kernels = [one for one in made.parameters() if one.ndim == 4 and one.shape[2] > 1 and one.shape[1] > 1]
        assert kernels
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in kernels)
    assert any(isinstance(one, Factorised) or type(one) is nn.Conv2d for one in made.modules())


def test_budgets_of_time_are_read_and_refused() -> None:
    original = Cost(10, 100, 40, latency=10_000_000)
    assert Budget(latency="8ms").limits(original) == {"latency": 8_000_000}
    assert Budget(latency="250us").limits(original) == {"latency": 250_000}
    assert Budget(latency="1.5s").limits(original) == {"latency": 1_500_000_000}
    assert Budget(latency=0.6).limits(original) == {"latency": 6_000_000}
    assert Budget.parse(["latency=60%"]).limits(original) == {"latency": 6_000_000}
    for wrong, told in ((8, "no unit"), ("8", "no unit"), ("8M", "us, ms, s"), (1.5, r"\(0, 1\]"), ("soon", "number")):
        with pytest.raises(BudgetError, match=told):
            Budget(latency=wrong)


def test_the_command_line_limits_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "small"
    options = ("--budget", "latency=0.95", "--batch", "16", "--channels-last", "--calibration", "none", "--json")
    code, told, _ = run(
        capsys, monkeypatch, "compress", "zoo:cifar10_resnet20", "--out", str(out), "-d", "svd", *options
    )
    assert code == 0
    content = json.loads(told)
    assert content["after"]["latency"] <= 0.95 * content["before"]["latency"]
    plan = json.loads((out / "plan.json").read_text())
    assert plan["settings"]["timed"]["batch"] == 16
    assert plan["settings"]["timed"]["channels_last"] is True
    page = (out / "report.html").read_text()
    assert "plans were timed beside the original" in page
    assert "--channels-last" in page


def test_what_is_expected_rises_through_what_was_measured() -> None:
    known = punctual._rising([(100.0, 100.0), (80.0, 40.0), (90.0, 35.0)])  # the last two are the same within noise
    assert [punctual._through(*known, total) for total in (80, 95, 40, 200)] == [40, 70, 20, 200]
    assert [punctual._through(*known[::-1], wanted) for wanted in (70, 20)] == [95, 40]
    slower = punctual._rising([(100.0, 100.0), (80.0, 120.0)])  # a plan that takes longer than the original
    assert punctual._through(*slower[::-1], 60) == 40
