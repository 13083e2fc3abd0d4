"""Which learning rate suits which decomposition and strength, with scaled gradients and with the factors' own.

ResNet-20 on CIFAR-10, calibrated on 512 training images; 50 steps of SGD on batches of 128 augmented training images,
with the rate rising over 5 of them and falling to zero; the mean loss of the last 10. `--work` as in finetune.py.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

from common import network, parser, record, require_data, write
from finetune import prepared

from rankfold.files.artifact import load, load_plan
from rankfold.files.original import rebuild
from rankfold.training import Training, fine_tune

RATES = (0.001, 0.003, 0.01)
STEPS, LAST = 50, 10
NETWORKS = (("cp3", "half"), ("cp3", "third"), ("cp3", "fifth"), ("spatial", "third"), ("tucker", "third"))


def main() -> None:
    """Every network at every rate, both ways."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--work", type=Path, required=True, help="folder for the compressed models")
    given = arguments.parse_args()
    folder = require_data(given)
    source, data = network(folder, "cifar10_resnet20", "cifar10_resnet20", "cifar10/train.npz")
    few, records = data.take(range(0, STEPS * 128 * 4, 4)), []
    for decomposition, case in NETWORKS:
        directory = prepared(folder, given.work, decomposition, case)
        plan = load_plan(directory)
        student = load(directory, rebuild(plan, directory)[0].model)
        for scaled in (True, False):
            losses = {}
            for rate in RATES:
                training = Training(epochs=1, rate=rate, scaled=scaled, augment="cifar")
                with tempfile.TemporaryDirectory() as place:
                    log = Path(place) / "log.csv"
                    fine_tune(student, few, teacher=source.model, plan=plan, training=training, log=log)
                    steps = [float(line["loss"]) for line in csv.DictReader(log.open())]
                losses[f"loss_at_rate_{rate}"] = round(sum(steps[-LAST:]) / LAST, 3)
            kept = plan.after.kept(plan.before)["macs"]
            gradients = "of the weights" if scaled else "of the factors"
            records.append(
                record(
                    decomposition=decomposition, macs_kept=round(kept, 3), gradients=gradients, **losses, steps=STEPS
                )
            )
            print(records[-1], flush=True)
    write(records)


if __name__ == "__main__":
    main()
