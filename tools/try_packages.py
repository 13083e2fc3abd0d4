"""Builds the wheel and the source distribution, and tries each in an empty environment: what `make wheel` does."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOKE = """
import tempfile, torch, rankfold
from rankfold.reports.demo import digits
assert "site-packages" in rankfold.__file__, rankfold.__file__
model, held_out = digits()
result = rankfold.compress(model, torch.zeros(1, *held_out.input_shape), budget=rankfold.Budget(macs=0.5))
with tempfile.TemporaryDirectory() as folder:
    again = rankfold.load(rankfold.save(result, folder + "/small"), digits()[0])
x = held_out.batch(0, 8)[0]
assert torch.equal(again(x), result.model(x))
print("compressed, saved and loaded with", rankfold.__version__)
"""


def main() -> None:
    """Builds, installs and runs both; ends with the first command that fails."""
    built = ROOT / "dist"
    shutil.rmtree(built, ignore_errors=True)
    _run(sys.executable, "-m", "hatchling", "build", "--directory", str(built))
    for package in sorted(built.iterdir()):
        with tempfile.TemporaryDirectory() as folder:
            _run(sys.executable, "-m", "venv", folder)
            python = str(Path(folder) / "bin" / "python")
            _run(
                python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "requirements.lock"), str(package)
            )
            _run(python, "-c", SMOKE, within=folder)
            _run(python, "-m", "rankfold", "--help", within=folder, quiet=True)
        print(f"{package.name}: {package.stat().st_size / 1e3:.0f} kB, installs and runs", flush=True)


def _run(*command: str, within: str | None = None, quiet: bool = False) -> None:
    output = subprocess.DEVNULL if quiet else None
    done = subprocess.run(command, cwd=within or ROOT, stdout=output, check=False)
    if done.returncode:
        sys.exit(f"failed: {' '.join(command[:6])}")


if __name__ == "__main__":
    main()
