"""Interpolative units: accuracy, perplexity and speed of networks with fewer channels, without labels or training.

ImageNet networks are calibrated on 500 unlabelled validation images and scored on 1,500 others; ResNet-20 on 512
training images and the CIFAR-10 test images; a language model on 288 blocks of 512 tokens of WikiText-2's validation
text, scored by perplexity on 12 evenly spaced blocks of 1,024 of its test text. `--only CASE` runs some cases, a case
being MODEL:DECOMPOSITIONS:BUDGET, with `:synthetic` behind it on inputs made from the network; `--speed` measures
latencies instead, in turns with the original and with low rank. `--language FOLDER` is the language model's.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from common import accuracy_record, keep, network, parser, record, require_data, unlabelled
from torch import Tensor, nn

from rankfold import Budget, Result, Study, compress, study
from rankfold.evaluation import Accuracy, accuracy, latency, perplexity
from rankfold.progress import Progress
from rankfold.sources.data import Normalisation, open_dataset
from rankfold.sources.models import Source, build_model, load_weights_
from rankfold.sources.zoo import IMAGENET_MEAN, IMAGENET_STD

CASES = (
    *(f"mobilenet_v2:interpolative:{budget}" for budget in (0.9, 0.8, 0.7, 0.5)),
    *(f"deit_tiny:svd,interpolative:{budget}" for budget in (0.9, 0.8, 0.7, 0.5)),
    *(f"resnet50:svd,interpolative:{budget}" for budget in (0.9, 0.8, 0.7, 0.5)),
    *(f"cifar10_resnet20:auto:{budget}" for budget in (0.5, 0.3, 0.2)),
    *(f"{network}:0.8:synthetic" for network in ("mobilenet_v2:interpolative", "resnet50:svd,interpolative")),
    "smollm2:interpolative:0.8",
)
BATCH = 10


def opened(folder: Path, name: str) -> Source:
    """A network of images with its weights."""
    if name != "resnet50":
        weights = name if name.startswith("cifar10") else f"imagenet_{name}"
        return network(folder, name, weights, "cifar10/test.npz" if "cifar" in name else "imagenet_val/test.npz")[0]
    source = build_model("torchvision:resnet50")
    source.model.maxpool = nn.MaxPool2d(3, 2, 0, ceil_mode=True)
    load_weights_(source.model, folder / "weights" / "imagenet_resnet50.safetensors")
    return source


def images(folder: Path, name: str, count: int) -> tuple[Any, list[Tensor]]:
    """What a network is scored on, and the batches it is calibrated on."""
    if not name.startswith("cifar10"):
        normal = Normalisation(IMAGENET_MEAN, IMAGENET_STD)
        known, scored = (
            open_dataset(f"npz:{folder / 'imagenet_val' / part}.npz", (3, 224, 224), normal)
            for part in ("calibration", "test")
        )
        chosen = known.sample(count)
        batches = (chosen.batch(k, min(k + BATCH, count))[0] for k in range(0, count, BATCH))
        return scored, [one.contiguous(memory_format=torch.channels_last) for one in batches]
    source, scored = network(folder, name, name, "cifar10/test.npz")
    return scored, unlabelled(folder, source, "cifar10/train.npz")


def studied(
    case: str,
    model: nn.Module,
    batches: Sequence[Tensor],
    calibration: Any,
    report: Progress,
    samples: int | None = None,
) -> Study:
    """What is measured once of a network of images, whose case begins with MODEL:DECOMPOSITIONS:BUDGET."""
    _, decomposition, budget = case.split(":")[:3]
    return study(
        model,
        torch.zeros(1, *batches[0].shape[1:]),
        decomposition=decomposition.split(",") if "," in decomposition else decomposition,
        budget=Budget(macs=float(budget)),
        calibration=calibration,
        calibration_samples=samples,
        progress=report,
    )


def image_record(case: str, result: Result, base: Accuracy, scored: Any, **more: Any) -> dict[str, Any]:
    """The record of a network of images, whose case begins with MODEL:DECOMPOSITIONS:BUDGET."""
    name, decomposition, budget = case.split(":")[:3]
    reached = accuracy(result.model, scored)
    return accuracy_record(
        decomposition,
        result,
        reached,
        base,
        case=case,
        model=name,
        data="CIFAR-10 test" if "cifar" in name else "ImageNet validation",
        budget=float(budget),
        lost=round(base.top1 - reached.top1, 2),
        **more,
        peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    )


def of_images(folder: Path, cases: Sequence[str], count: int, report: Progress) -> None:
    """Writes the records of a network of images at several budgets, which are all made of one study of it."""
    name, _, _, *synthetic = cases[0].split(":")
    model: Any = opened(folder, name).model
    model.to(memory_format=torch.channels_last)
    scored, batches = images(folder, name, count)
    measured = studied(cases[0], model, batches, "synthetic" if synthetic else batches, report)
    base = accuracy(model, scored)
    for case in cases:
        result = measured.compress(Budget(macs=float(case.split(":")[2])), progress=report)
        found = image_record(
            case,
            result,
            base,
            scored,
            calibration=result.plan.settings["calibration"],
            calibration_samples=result.plan.settings["calibration_samples"],
            fitted=result.plan.settings["fitted"],
            narrowed=len(result.plan.narrowings),
            decomposed=len(result.plan.decomposed),
        )
        keep([found])


def of_language(folder: Path, case: str, text: Path, report: Callable[..., None]) -> dict[str, Any]:
    """The record of a language model: the budget is a share of what is neither embedding nor head."""
    _, decomposition, budget = case.split(":")
    model, inputs, tested = language(folder, text, 288)
    outside, inside = sizes(model)
    limit = int(outside + float(budget) * inside)
    result = compress(
        model,
        {"input_ids": inputs[0]["input_ids"][:1], "use_cache": False},
        decomposition=decomposition.split(","),
        budget=Budget(params=limit),
        calibration=inputs,
        sequential=False,
        progress=report,
    )
    return record(
        case=case,
        model="SmolLM2-135M-Instruct",
        data="WikiText-2 test, 12 blocks of 1,024 tokens",
        perplexity=round(perplexity(result.model, tested).value, 2),
        base_perplexity=round(perplexity(model, tested).value, 2),
        blocks_kept=round((result.after.params - outside) / inside, 4),
        seconds=round(result.seconds, 1),
        peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    )


def language(folder: Path, text: Path, count: int) -> tuple[Any, list[dict[str, Any]], Tensor]:
    """A language model, batches of so many rows of 512 tokens to calibrate it on, and the rows it is scored on."""
    model: Any = build_model(f"hf:{folder}").model.float()
    from transformers import AutoTokenizer  # importable once the model is built, whatever torchvision is there

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    known, tested = (
        tokenizer((text / f"{one}.txt").read_text(), return_tensors="pt").input_ids[0] for one in ("valid", "test")
    )
    rows = known[: count * 512].view(count, 512)
    batches = [{"input_ids": rows[k : k + 4], "use_cache": False} for k in range(0, count, 4)]
    return model, batches, blocks(tested, 1024, 12)


def sizes(model: Any) -> tuple[int, int]:
    """Parameters of a language model's embedding, and of what is neither that nor the head that is tied to it."""
    outside = model.get_input_embeddings().weight.numel()
    return outside, sum(one.numel() for one in model.parameters()) - outside


def blocks(tokens: Tensor, length: int, count: int) -> Tensor:
    """Evenly spaced blocks of tokens, from the first to the last."""
    starts = torch.linspace(0, len(tokens) - length, count).long()
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def speeds(folder: Path, count: int, align: int | None, report: Callable[..., None]) -> list[dict[str, Any]]:
    """Latencies at 70 % of the MACs, of units and of low rank, side by side with the original, channels last."""
    found = []
    for name in ("mobilenet_v2", "resnet50"):
        source = opened(folder, name)
        _, batches = images(folder, name, count)
        made: dict[str, Result] = {
            method: compress(
                source.model,
                batches[0][:1],
                decomposition=method,
                budget=Budget(macs=0.7),
                calibration=batches,
                sequential=False,
                align=align,
                progress=report,
            )
            for method in ("interpolative", "svd")
        }
        models: list[Any] = [source.model, *(one.model for one in made.values())]
        models = [model.to(memory_format=torch.channels_last) for model in models]
        for batch in (1, 16):
            x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
            times = latency(models, x)
            for method, own in zip(made, times[1:], strict=True):
                macs = made[method].after.macs / made[method].before.macs
                found.append(
                    record(
                        case=f"speed:{name}:{method}:{batch}{f':align {align}' if align else ''}",
                        model=name,
                        method=method,
                        batch=batch,
                        align=align or 1,
                        macs_kept=round(macs, 4),
                        time_kept=round(own / times[0], 4),
                        realised=round((1 - own / times[0]) / (1 - macs), 3),
                        original_ms=round(times[0], 2),
                    )
                )
                print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """All cases, or some; each is written down once it is done."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", action="append", help="MODEL:DECOMPOSITIONS:BUDGET[:synthetic] (repeatable)")
    arguments.add_argument("--images", type=int, default=500, help="calibration images of ImageNet networks")
    arguments.add_argument("--language", type=Path, help="folder of the language model")
    arguments.add_argument("--speed", action="store_true", help="measure latencies")
    arguments.add_argument("--align", type=int, help="widths on multiples of this, for --speed")
    given = arguments.parse_args()
    folder, last = require_data(given), [""]

    def report(what: str, done: int, total: int, note: str = "", /) -> None:
        if what != last[0]:
            print("  ", what, flush=True)
            last[0] = what

    if given.speed:
        keep(speeds(folder, min(given.images, 50), given.align, report))
        return
    for (name, *_), cases in groupby(given.only or CASES, key=_studied):
        if name != "smollm2":
            of_images(folder, list(cases), given.images, report)
        elif given.language is None:
            print("the language model is left out; give its folder with --language")
        else:
            keep([of_language(given.language, case, folder / "wikitext2", report) for case in cases])


def _studied(case: str) -> tuple[str, ...]:
    """What cases have in common that are made of one study."""
    name, decomposition, _, *synthetic = case.split(":")
    return (name, decomposition, *synthetic)


if __name__ == "__main__":
    main()
