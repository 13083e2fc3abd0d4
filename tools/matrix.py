"""Runs the tests on the interpreters that are there, with the oldest and the newest torch: what `make matrix` does.

Environments are kept in .matrix/PYTHON-TORCH. Which combinations were tried, and what came of them, is written to
benchmarks/results/matrix-DATE.json; one that cannot be installed is recorded as that. `--only 3.11-2.13.0` runs some,
`--tests PATH` other tests than the quick ones.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.6.0", "2.13.0", "2.14.1")
TESTS = (
    "tests/conformance",
    "tests/decompositions",
    "tests/network",
    "tests/search/test_units.py",
    "tests/cli/test_cli.py",
)
NEEDS = (
    "beartype",
    "hypothesis",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "tensorly",
    "scikit-learn",
    "transformers",
)


def main() -> None:
    """Tries all combinations, or those asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", help="PYTHON-TORCH (repeatable)")
    parser.add_argument("--tests", nargs="*", default=TESTS)
    given = parser.parse_args()
    names = given.only or [f"{python}-{torch}" for python, torch in itertools.product(PYTHONS, TORCHES)]
    path = ROOT / "benchmarks" / "results" / f"matrix-{datetime.date.today().isoformat()}.json"
    records = {one["case"]: one for one in json.loads(path.read_text())} if path.exists() else {}
    for name in names:
        result = _tried(name, given.tests)
        print(f"{name}: {result}", flush=True)
        records[name] = {"case": name, "result": result, "tests": " ".join(given.tests), "command": "make matrix"}
        path.write_text(json.dumps(list(records.values()), indent=2) + "\n")


def _tried(name: str, tests: Sequence[str]) -> str:
    """The last line that the tests print under a Python and torch; or why they could not be run."""
    version, torch = name.split("-")
    interpreter, place = _interpreter(version), ROOT / ".matrix" / name
    if not interpreter:
        return "no such interpreter here"
    python = str(place / "bin" / "python")
    for command in (
        [interpreter, "-m", "venv", str(place)],
        [python, "-m", "pip", "install", "--quiet", f"torch=={torch}"],
        [python, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[images,train]", *NEEDS, f"torch=={torch}"],
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"not installed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "--numprocesses", "2", *tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing"])[-1].strip("= ")


def _interpreter(version: str) -> str | None:
    """A Python of that version that starts: on the path, or of pyenv."""
    own = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for one in filter(None, (shutil.which(f"python{version}"), *map(str, own))):
        if not subprocess.run([one, "--version"], capture_output=True, check=False).returncode:
            return one
    return None


if __name__ == "__main__":
    main()
