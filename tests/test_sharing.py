"""Several processes on one network: the same plan and the same factors as one, and one of them that writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from rankfold.files.artifact import load_plan
from rankfold.sharing import everywhere, owned, place, shared

SCRIPT = """
import sys, torch
from torch import distributed, nn
import rankfold
from rankfold.calibration import Refining

_, out, decompositions, rank, processes = sys.argv
if int(processes) > 1:
    distributed.init_process_group("gloo", init_method=f"file://{out}.store", rank=int(rank), world_size=int(processes))
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
    nn.Conv2d(12, 12, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 40),
    nn.ReLU(), nn.Linear(40, 10),
).eval()
x = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1)).split(16)
states = {}
for decomposition in decompositions.split("+"):
    names = decomposition.split(",")
    result = rankfold.compress(model, x[0][:1], decomposition=names, budget=rankfold.Budget(macs=0.5), calibration=x,
                               refine=1)
    states |= {f"{decomposition} {name}": tensor for name, tensor in result.model.state_dict().items()}
if int(processes) > 2:
    torch.save(states, out) if rank == "0" else None
    sys.exit()
result = rankfold.compress(model, x[0][:1], decomposition="svd", budget=rankfold.Budget(macs=0.5), calibration=x, distil=1)
states |= {f"distilled {name}": tensor for name, tensor in result.model.state_dict().items()}
if distributed.is_initialized():
    try:
        rankfold.compress(model, x[0][:1], decomposition="svd", budget=rankfold.Budget(latency=0.9))
    except rankfold.BudgetError as error:
        assert "a limit on the latency is met by timing in one process" in str(error)
    else:
        raise AssertionError("latency was measured by several")
try:
    wide = nn.Linear(4, 4)
    wide.weight.data.fill_(float("nan"))
    rankfold.compress(nn.Sequential(nn.Linear(4, 4), wide), torch.zeros(1, 4), decomposition="svd",
                      budget=rankfold.Budget(macs=0.5), calibration=[torch.randn(8, 4)])
except rankfold.RankfoldError as error:
    states["failed"] = torch.tensor(1)
if rank == "0":
    torch.save(states, out)
"""


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def found_by(processes: int, decompositions: str, folder: Path) -> dict[str, torch.Tensor]:
    """What the script's first process wrote, of so many that run at once, each with one thread."""
    out = folder / f"{processes}.pt"
    (folder / "compress.py").write_text(SCRIPT)
    commands = [
        [sys.executable, str(folder / "compress.py"), str(out), decompositions, str(rank), str(processes)]
        for rank in range(processes)
    ]
    running = [subprocess.Popen(one, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) for one in commands]
    for one in running:
        _, told = one.communicate(timeout=200)
        assert one.returncode == 0, told[-2000:]
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


def test_the_command_writes_once_and_says_it_once(tmp_path: Path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "rankfold"]
    command = ["compress", "zoo:digits", "--budget", "macs=0.4", "--calibration", "synthetic"]
    more = ["--calibration-samples", "32", "--json", "--out", str(tmp_path / "small")]
    done = subprocess.run(
        [sys.executable, *launcher, *command, *more], capture_output=True, text=True, env=ENVIRONMENT, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plan = load_plan(tmp_path / "small")
    assert json.loads(done.stdout)["after"]["macs"] == plan.after.macs <= 0.4 * plan.before.macs


def silent_steps(done: int, total: int) -> None:
    """A report that nobody reads."""


def test_one_process_does_everything_itself():
    assert place() == (0, 1)
    assert all(owned(number) for number in range(3))
    assert everywhere("x") == ["x"]
    assert shared([1, 2, 3], lambda one: one * 2, silent_steps, packed=lambda made: 1 / 0) == [2, 4, 6]
