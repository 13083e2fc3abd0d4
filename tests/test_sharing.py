"""Several processes on one network: the same plan and the same factors as one, and one of them that writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from processes import Running, join
from torch import nn

from rankfold import Budget, BudgetError, RankfoldError, compress
from rankfold.cli import main
from rankfold.files.artifact import load_plan
from rankfold.sharing import everywhere, owned, place, shared


def compressed(out: Path, decompositions: str, rank: int, processes: int) -> None:
    """Writes what one of so many processes makes of a small network, if it is the first."""
    if processes > 1:
        join(out.with_suffix(".store"), rank, processes)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 40),
        nn.ReLU(), nn.Linear(40, 10),
    ).eval()  # fmt: skip
    x = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1)).split(16)
    half = {"budget": Budget(macs=0.5), "calibration": x}
    states = {}
    for names in decompositions.split("+"):
        result = compress(model, x[0][:1], decomposition=names.split(","), refine=1, **half)
        states |= {f"{names} {name}": tensor for name, tensor in result.model.state_dict().items()}
    if processes <= 2:
        result = compress(model, x[0][:1], decomposition="svd", distil=1, **half)
        states |= {f"distilled {name}": tensor for name, tensor in result.model.state_dict().items()}
        with pytest.raises(RankfoldError):
            _of_what_is_not_finite()
        states["failed"] = torch.tensor(1)
    if processes == 2:
        with pytest.raises(BudgetError, match="a limit on the latency is met by timing in one process"):
            compress(model, x[0][:1], decomposition="svd", budget=Budget(latency=0.9))
    if not rank:
        torch.save(states, out)


def _of_what_is_not_finite() -> None:
    wide = nn.Linear(4, 4)
    wide.weight.data.fill_(float("nan"))
    model, x = nn.Sequential(nn.Linear(4, 4), wide), torch.randn(8, 4)
    compress(model, x[:1], decomposition="svd", budget=Budget(macs=0.5), calibration=[x])


def found_by(processes: int, decompositions: str, folder: Path) -> dict[str, torch.Tensor]:
    """What the first wrote of so many processes that run at once, each with one thread."""
    out = folder / f"{processes}.pt"
    running = [Running(folder, compressed, out, decompositions, rank, processes) for rank in range(processes)]
    for one in running:
        done = one.finished()
        assert done.returncode == 0, done.told[-2000:]
    return torch.load(out, weights_only=True)


def test_several_processes_come_to_the_same_factors_as_one(tmp_path: Path):
    one = found_by(1, "cp3+svd,interpolative", tmp_path)
    two = found_by(2, "cp3+svd,interpolative", tmp_path)
    four = found_by(4, "cp3", tmp_path)
    assert "failed" in one
    assert one.keys() == two.keys() > four.keys() > set()
    for name, tensor in (*two.items(), *four.items()):
        if name.startswith("distilled"):  # gradients are summed in another order
            torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-5)
        else:
            assert torch.equal(tensor, one[name]), name


def commanded(out: Path, rank: int, processes: int) -> None:
    """The command line in one of so many processes."""
    join(out.with_suffix(".store"), rank, processes)
    command = ["compress", "zoo:digits", "--budget", "macs=0.4", "--calibration", "synthetic"]
    sys.argv = ["rankfold", *command, "--calibration-samples", "32", "--json", "--out", str(out)]
    main()


def test_the_command_writes_once_and_says_it_once(tmp_path: Path):
    running = [Running(tmp_path, commanded, tmp_path / "small", rank, 2) for rank in range(2)]
    done = [one.finished() for one in running]
    assert [one.returncode for one in done] == [0, 0], done
    plan = load_plan(tmp_path / "small")
    said = "".join(one.told for one in done)
    assert json.loads(said[said.index("{") :])["after"]["macs"] == plan.after.macs <= 0.4 * plan.before.macs


def silent_steps(done: int, total: int) -> None:
    """A report that nobody reads."""


def test_one_process_does_everything_itself():
    assert place() == (0, 1)
    assert all(owned(number) for number in range(3))
    assert everywhere("x") == ["x"]
    assert shared([1, 2, 3], lambda one: one * 2, silent_steps, packed=lambda made: 1 / 0) == [2, 4, 6]
