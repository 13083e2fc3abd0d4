"""ResNet-20 on CIFAR-10, compressed and fine-tuned: top-1 on the 9,980 test images, read once, at the end.

Compressed with cp3 and calibrated on 512 training images without their labels, then fine-tuned on 45,000 of the 50,000;
the other 5,000 are held out (`--held-out`). A run that was interrupted goes on from its checkpoint when started again.
`--case` names the budget, `--work` the folder for the models; `--refine`, `--epochs`, `--rate` and the like as in
`rankfold`. With `--synthetic N` nothing but the network is used: calibration and fine-tuning on N inputs made from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, network, parser, record, require_data, unlabelled, write

from rankfold import Budget, compress, save
from rankfold.files.artifact import digest, load_plan
from rankfold.fine_tuning import fine_tune_saved
from rankfold.training import Losses, Training

CASES = {
    "tt": Budget(macs=0.296, params=0.277),
    "cp": Budget(macs=0.266, params=0.224),
    "fifth": Budget(macs=0.2, params=0.2),
    "half": Budget(macs=0.5),
    "third": Budget(macs=0.3),
}
"""The sizes that arXiv 2409.03555 reports for its TT and its CP, a fifth of both, and of MACs a half and 30 %."""


def main() -> None:
    """Compresses, fine-tunes, records."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--case", choices=CASES, required=True)
    arguments.add_argument("--work", type=Path, required=True, help="folder for the compressed and fine-tuned models")
    arguments.add_argument("--epochs", type=int, default=30)
    arguments.add_argument("--rate", type=float, default=0.003)
    arguments.add_argument("--optimiser", default="sgd")
    arguments.add_argument("--decomposition", default="cp3")
    arguments.add_argument("--synthetic", type=int, default=0, help="how many inputs are made, in place of data")
    arguments.add_argument("--start", type=Path, help="a fine-tuned model of --work to go on from, in a second run")
    arguments.add_argument("--teacher", default="", help="another zoo network, such as cifar10_resnet32")
    arguments.add_argument("--damping", type=float, default=3e-4)
    arguments.add_argument("--refine", type=int, default=0, help="epochs block by block, before")
    arguments.add_argument(
        "--logits", type=float, default=1.0, help="weight of the distance from the teacher's outputs"
    )
    arguments.add_argument("--ema", type=float, default=0.0)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--batch-size", type=int, default=128)
    arguments.add_argument("--held-out", type=int, default=5000, help="training images that are kept for scores")
    given = arguments.parse_args()
    folder = require_data(given)
    small = given.start or prepared(
        folder, given.work, given.decomposition, given.case, synthetic=bool(given.synthetic), refine=given.refine
    )
    chosen = ("epochs", "optimiser", "rate", "damping", "logits", "ema", "seed", "batch_size", "held_out")
    made = "-".join(str(getattr(given, name)) for name in chosen)
    tuned = given.work / f"{small.name}-{made}{given.teacher}"
    teacher = (f"zoo:{given.teacher}", folder / "weights" / f"{given.teacher}.safetensors")
    training = Training(
        epochs=given.epochs,
        batch_size=given.batch_size,
        optimiser=given.optimiser,
        rate=given.rate,
        damping=given.damping,
        ema=given.ema,
        seed=given.seed,
        augment="cifar",
    )
    found = fine_tune_saved(
        small,
        f"synthetic:{given.synthetic}" if given.synthetic else f"npz:{folder / 'cifar10' / 'train.npz'}",
        tuned,
        training=training,
        losses=Losses(logits=given.logits),
        weights=folder / "weights" / "cifar10_resnet20.safetensors",
        teacher=teacher if given.teacher else None,
        held_out=None if given.synthetic else given.held_out,
        test=f"npz:{folder / 'cifar10' / 'test.npz'}",
        resume=(given.work / f"{tuned.name}.training" / "checkpoint.safetensors").exists(),
        progress=_printed,
    )
    kept = found.plan.after.kept(found.plan.before)
    one = record(
        case=given.case,
        decomposition=given.decomposition,
        epochs=given.epochs,
        optimiser=given.optimiser,
        rate=given.rate,
        scaled=training.steps_of_weights,
        damping=given.damping,
        refine=given.refine,
        logits=given.logits,
        ema=given.ema,
        seed=given.seed,
        batch_size=given.batch_size,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        teacher=given.teacher or "original",
        start=given.start.name if given.start else "compressed",
        epochs_before=sum(run["training"]["epochs"] for run in load_plan(small).settings.get("fine_tunings", [])),
        inputs=f"{given.synthetic} synthetic" if given.synthetic else f"CIFAR-10 train, {50_000 - given.held_out:,}",
        macs_kept=round(kept["macs"], 4),
        params_kept=round(kept["params"], 4),
        base_top1=round(found.test[0], 2),
        compressed_top1=round(found.test[1], 2),
        top1=round(found.test[2], 2),
        loss=round(found.epochs[-1].loss, 4),
        held_out_top1=[round(epoch.top1, 2) for epoch in found.epochs if epoch.top1 is not None],
        seconds_per_epoch=round(sum(epoch.seconds for epoch in found.epochs) / len(found.epochs), 1),
        precision=found.precision,
        data="CIFAR-10 test",
        examples=9980,
    )
    earlier = sorted(RESULTS.glob("finetune-*.json"))
    kept_records = json.loads(earlier[-1].read_text()) if earlier else []
    key = ("case", "decomposition", "epochs", "optimiser", "rate", "scaled", "damping", "teacher", "start", "inputs")
    usual = {"refine": 0, "logits": 1.0, "ema": 0.0, "seed": 0, "batch_size": 128}
    others = (old for old in kept_records if any({**usual, **old}.get(name) != one[name] for name in (*key, *usual)))
    write([*others, one])


def prepared(
    folder: Path, work: Path, decomposition: str, case: str, *, synthetic: bool = False, refine: int = 0
) -> Path:
    """The directory of the compressed network, which is made if it is not there."""
    small = work / f"{decomposition}-{case}{f'-refined-{refine}' if refine else ''}{'-synthetic' if synthetic else ''}"
    if not small.exists():
        source, _ = network(folder, "cifar10_resnet20", "cifar10_resnet20", "cifar10/test.npz")
        images = "synthetic" if synthetic else unlabelled(folder, source, "cifar10/train.npz")
        example, budget = torch.zeros(1, 3, 32, 32), CASES[case]
        options: dict[str, Any] = {"decomposition": decomposition, "budget": budget, "refine": refine}
        result = compress(source.model, example, calibration=images, **options)
        weights = folder / "weights" / "cifar10_resnet20.safetensors"
        origin = {"model": "zoo:cifar10_resnet20", "input_shape": [3, 32, 32], "seed": 0}
        save(result, small, source={**origin, "weights": str(weights), "weights_sha256": digest(weights)})
    return small


def _printed(what: str, done: int, total: int, note: str = "", /) -> None:
    """Progress, a line per hundred steps."""
    if what == "fine-tuning" and done % 100 == 0:
        print(done, total, note, flush=True)


if __name__ == "__main__":
    main()
