"""LeNet on MNIST, the whole pipeline in one command: a tenth of the parameters, fine-tuned, scored on the test data."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import parser, record, require_data, write

EPOCHS = 3


def main() -> None:
    """Runs the command as a user would, and records what it says and how long it took."""
    folder = require_data(parser(__doc__ or "").parse_args())
    train, test = (f"npz:{folder / 'mnist' / name}.npz" for name in ("train", "test"))
    with tempfile.TemporaryDirectory() as work:
        command = [
            *(sys.executable, "-m", "rankfold", "compress", "zoo:mnist_lenet"),
            *("--weights", str(folder / "weights" / "mnist_lenet.safetensors")),
            *("--budget", "params=0.1", "--decomposition", "cp3", "--calibration", train),
            *("--finetune", train, "--epochs", str(EPOCHS), "--test", test),
            *("--out", str(Path(work) / "small"), "--json"),
        ]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
    found = json.loads(done.stdout)["fine_tuning"]
    write(
        [
            record(
                model="mnist_lenet",
                epochs=EPOCHS,
                macs_kept=round(found["kept"]["macs"], 4),
                params_kept=round(found["kept"]["params"], 4),
                **{f"{stage.replace('-', '_')}_top1": round(top1, 2) for stage, top1 in found["test_top1"].items()},
                seconds=round(seconds, 1),
                data="MNIST test",
                examples=10_000,
            )
        ]
    )


if __name__ == "__main__":
    main()
