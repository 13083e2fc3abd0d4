"""VGG-16 on CIFAR-10, as arXiv 2409.03555 compresses it: trained, compressed, fine-tuned; top-1 on 9,980 images.

The network is the one that pruning papers take: thirteen 3×3 convolutions with batch norms, five poolings, one linear
layer. It is trained on all 50,000 images, compressed with 512 of them without labels, and fine-tuned on all; the test
images are read at the end. `--work` keeps the trained and the compressed networks, and a second run starts from them.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any, cast

import torch
from common import keep, parser, record, require_data
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from rankfold import Budget, compress, load, plan_of, save
from rankfold.evaluation import accuracy
from rankfold.files.artifact import load_metrics
from rankfold.sources.data import Dataset, Normalisation, open_dataset
from rankfold.training import Losses, Training, fine_tune
from rankfold.training.augment import cifar

WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""Channels of the convolutions, 0 a pooling (Simonyan and Zisserman, arXiv 1409.1556, table 1, D)."""
BUDGETS = {"0.955": Budget(macs=0.139, params=0.045), "0.986": Budget(macs=0.138, params=0.014)}
"""What the paper leaves of MACs and parameters in its two rows of VGG-16, by the share of parameters that goes."""
NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LIKE: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


def vgg16() -> nn.Sequential:
    """The network, as initialised."""
    layers: list[nn.Module] = []
    channels = 3
    for width in WIDTHS:
        if width:
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


def trained(data: Dataset, epochs: int, device: str, rate: float = 0.1) -> nn.Module:
    """The network after so many epochs on the images, padded, cropped and mirrored; SGD under a triangular rate."""
    torch.manual_seed(0)
    model: Any = vgg16().to(device)
    model.to(memory_format=torch.channels_last)
    x, y = data.batch(0, len(data))
    x, y, black = x.to(device), torch.as_tensor(y, device=device), data.black.to(device)
    batch, steps = 512, len(data) // 512
    optimiser = torch.optim.SGD(model.parameters(), rate, **LIKE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, epochs * steps, pct_start=0.2, cycle_momentum=False)
    draws = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=draws).to(device)
        for step in range(steps):
            chosen = order[step * batch :][:batch]
            images = _moved(x[chosen], black, draws)
            with torch.autocast(device, torch.bfloat16):
                loss = functional.cross_entropy(model(images), y[chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()
    return cast(nn.Module, model)


def _moved(x: Tensor, black: Tensor, draws: torch.Generator) -> Tensor:
    """The augmentation of the package, for images that lie on a GPU."""
    if x.device.type == "cpu":
        return cifar(x, black, draws)
    with torch.device(x.device):
        on_device = torch.Generator(x.device).manual_seed(int(torch.randint(2**31, (), generator=draws, device="cpu")))
        return cifar(x, black, on_device).contiguous(memory_format=torch.channels_last)


def main() -> None:
    """Trains or loads, compresses, fine-tunes, records."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--work", type=Path, required=True, help="folder for the trained network")
    arguments.add_argument("--only", choices=BUDGETS, action="append")
    arguments.add_argument("--decomposition", default="tucker,interpolative")
    arguments.add_argument("--train", type=int, default=60, help="epochs of the original, where it is not in --work")
    arguments.add_argument("--epochs", type=int, default=60, help="epochs of fine-tuning, 0 for none")
    arguments.add_argument("--rate", type=float, default=0.05)
    arguments.add_argument("--ema", type=float, default=0.999)
    arguments.add_argument("--batch-size", type=int, default=512)
    arguments.add_argument("--device", default="cpu")
    given = arguments.parse_args()
    folder = require_data(given)
    data, tested = (open_dataset(f"npz:{folder / 'cifar10' / name}.npz", (3, 32, 32), NORMALISATION)
                    for name in ("train", "test"))  # fmt: skip
    weights = given.work / "vgg16.safetensors"
    start = time.perf_counter()
    if weights.exists():
        model: Any = vgg16().eval()
        model.load_state_dict({name: one.float() for name, one in load_file(weights).items()})
        model.to(given.device).to(memory_format=torch.channels_last)
    else:
        model = trained(data, given.train, given.device)
        given.work.mkdir(parents=True, exist_ok=True)
        save_file({name: one.bfloat16().contiguous() for name, one in model.state_dict().items()}, weights)
        print("trained", accuracy(model, tested).top1, time.perf_counter() - start, flush=True)
    base = accuracy(model, tested).top1
    chosen = data.sample(512)
    images = [chosen.batch(at, at + 128)[0].to(given.device) for at in range(0, 512, 128)]
    for case in given.only or BUDGETS:
        small, seconds = _compressed(model, images, case, given)
        plan = plan_of(small)
        kept = plan.after.kept(plan.before)
        one = record(
            case=f"{case}:{given.decomposition}:{given.epochs}",
            budget=case,
            decomposition=given.decomposition,
            macs_kept=round(kept["macs"], 4),
            params_kept=round(kept["params"], 4),
            base_top1=round(base, 2),
            compressed_top1=round(accuracy(small, tested).top1, 2),
            seconds=round(seconds, 1),
            device=torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
            data="CIFAR-10 test",
            examples=len(tested),
        )
        keep([one | (_tuned(small, model, data, tested, given) if given.epochs else {"epochs": 0})])


def _compressed(model: nn.Module, images: list[Tensor], case: str, given: Namespace) -> tuple[nn.Module, float]:
    """The network within a budget, and how long it took; kept in `--work`, and taken from there."""
    folder = given.work / f"{given.decomposition.replace(',', '-')}-{case}"
    if not folder.exists():
        found = compress(
            model,
            images[0][:1],
            decomposition=given.decomposition.split(","),
            budget=BUDGETS[case],
            calibration=images,
            progress=_printed,
        )
        save(found, folder, metrics={"seconds": found.seconds})
    return load(folder, model), load_metrics(folder)["seconds"]


def _tuned(small: nn.Module, model: nn.Module, data: Dataset, tested: Dataset, given: Namespace) -> dict[str, Any]:
    """What is recorded of a compressed network once it is fine-tuned, taught by its original."""
    training = Training(
        epochs=given.epochs, batch_size=given.batch_size, rate=given.rate, ema=given.ema, augment="cifar", damping=0.0
    )
    tuned = fine_tune(
        small, data, teacher=model, plan=plan_of(small), training=training, losses=Losses(), progress=_printed
    )
    return {
        "epochs": training.epochs,
        "rate": training.rate,
        "ema": training.ema,
        "batch_size": training.batch_size,
        "top1": round(accuracy(tuned.model, tested).top1, 2),
        "seconds_per_epoch": round(sum(epoch.seconds for epoch in tuned.epochs) / len(tuned.epochs), 1),
        "precision": tuned.precision,
    }


def _printed(what: str, done: int, total: int, note: str = "", /) -> None:
    """Progress, a line per thousand steps."""
    if done % 1000 == 0:
        print(what, done, total, note, flush=True)


if __name__ == "__main__":
    main()
