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

if "WORLD_SIZE" in __import__("os").environ:
    distributed.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
    nn.Conv2d(24, 24, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 40),
    nn.ReLU(), nn.Linear(40, 10),
).eval()
x = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1)).split(16)
states = {}
for decomposition in ("cp3", "svd,interpolative")[: int(sys.argv[2])]:
    names = decomposition.split(",")
    result = rankfold.compress(model, x[0][:1], decomposition=names, budget=rankfold.Budget(macs=0.5), calibration=x,
                               refine=1)
    states |= {f"{decomposition} {name}": tensor for name, tensor in result.model.state_dict().items()}
if sys.argv[2] == "1":
    torch.save(states, sys.argv[1]) if distributed.get_rank() == 0 else None
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
if not distributed.is_initialized() or distributed.get_rank() == 0:
    torch.save(states, sys.argv[1])
"""


def started(processes: int, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A run in so many processes, of one thread each, over loopback."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-endpoint=localhost:0"]
        launcher += ["--rdzv-backend=c10d"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, timeout=300)


def test_several_processes_come_to_the_same_factors_as_one(tmp_path: Path):
    script = tmp_path / "compress.py"
    script.write_text(SCRIPT)
    found = []
    for count in (1, 2, 4):
        done = started(count, str(script), str(tmp_path / f"{count}.pt"), "1" if count == 4 else "2")
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(tmp_path / f"{count}.pt", weights_only=True))
    one, *several = found
    assert "failed" in one
    assert one.keys() == several[0].keys() > several[1].keys() > set()
    for other in several:
        for name, tensor in other.items():
            if name.startswith("distilled"):  # gradients are summed in another order
                torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-5)
            else:
                assert torch.equal(tensor, one[name]), name


def test_the_command_writes_once_and_says_it_once(tmp_path: Path):
    command = ["-m", "rankfold", "compress", "zoo:digits", "--budget", "macs=0.4", "--calibration", "synthetic"]
    done = started(2, *command, "--calibration-samples", "32", "--json", "--out", str(tmp_path / "small"))
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
