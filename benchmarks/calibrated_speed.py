"""How long calibrated compression of real networks takes, its peak memory, and what comes out, case by case.

Every case runs in a process of its own. `--before FOLDER` is another checkout, whose `src` does the same cases in turn
with this one: the records then hold both. ResNet-18 and VGG-16 are as they are initialised, with batch
norms that hold the statistics of 64 images; all other networks are trained. Building and loading are not timed.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import keep, parser, record, require_data
from torch import Tensor, distributed, nn

Made = tuple[nn.Module, Any, dict[str, Any], Callable[[nn.Module], float] | None]
"""A network, example inputs, options of `compress`, and what scores the result, if anything does."""


def resnet18(folder: Path) -> Made:
    """`cp3` at half the MACs, on synthetic inputs."""
    model = _as_new("resnet18", folder)
    return model, torch.zeros(1, 3, 224, 224), {"decomposition": "cp3", "budget": {"macs": 0.5}}, None


def resnet50(folder: Path) -> Made:
    """`auto` at 70 % of the MACs, on 500 images."""
    return _imagenet(folder, "resnet50", {"decomposition": "auto", "budget": {"macs": 0.7}})


def vgg16(folder: Path) -> Made:
    """`tucker` at half the MACs, on 64 images."""
    model, (_, batches) = _as_new("vgg16", folder), _images(folder, "mobilenet_v2", 64)
    options = {"decomposition": "tucker", "budget": {"macs": 0.5}, "calibration": batches}
    return model, torch.zeros(1, 3, 224, 224), options, None


def mobilenet_v2(folder: Path) -> Made:
    """Channels at 80 % of the MACs, on 500 images."""
    return _imagenet(folder, "mobilenet_v2", {"decomposition": "interpolative", "budget": {"macs": 0.8}})


def resnet20(folder: Path) -> Made:
    """`cp3` at 30 % of the MACs, on 512 CIFAR-10 training images."""
    from common import network, unlabelled

    from rankfold.evaluation import accuracy

    source, scored = network(folder, "cifar10_resnet20", "cifar10_resnet20", "cifar10/test.npz")
    batches = unlabelled(folder, source, "cifar10/train.npz")
    options = {"decomposition": "cp3", "budget": {"macs": 0.3}, "calibration": batches}
    return source.model, torch.zeros(1, 3, 32, 32), options, lambda model: accuracy(model, scored).top1


def smollm2(folder: Path) -> Made:
    """`svd` at 80 % of the parameters of the blocks, on 64 × 512 tokens."""
    from units import language, sizes

    from rankfold.evaluation import perplexity
    from rankfold.network.passes import few

    model, batches, tested = language(folder / "smollm2", folder / "wikitext2", 64)
    outside, inside = sizes(model)
    budget = {"params": int(outside + 0.8 * inside)}
    options = {"decomposition": "svd", "budget": budget, "calibration": batches}
    return model, few(batches, 1)[0], options, lambda one: perplexity(one, tested).value


def conv3d(folder: Path) -> Made:
    """CP of one 3×3×3 convolution from 1,024 to 512 channels, at half its MACs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1024, 512, 3, padding=1))
    return model, torch.zeros(1, 1024, 4, 4, 4), {"decomposition": "cp", "budget": {"macs": 0.5}}, None


CASES = {one.__name__: one for one in (resnet18, resnet50, vgg16, mobilenet_v2, resnet20, smollm2, conv3d)}


def _as_new(name: str, folder: Path) -> nn.Module:
    """A torchvision network with seeded weights, and batch norms that hold the statistics of images."""
    from rankfold.sources.models import build_model

    torch.manual_seed(0)
    model: nn.Module = build_model(f"torchvision:{name}").model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        for batch in _images(folder, "mobilenet_v2", 64)[1]:
            model(batch)
    return model.eval()


def _images(folder: Path, name: str, count: int) -> tuple[Any, list[Tensor]]:
    from units import images

    return images(folder, name, count)


def _imagenet(folder: Path, name: str, options: dict[str, Any]) -> Made:
    """A trained ImageNet network on 500 images, channels last."""
    from units import opened

    from rankfold.evaluation import accuracy

    scored, batches = _images(folder, name, 500)
    model: Any = opened(folder, name).model
    model.to(memory_format=torch.channels_last)
    return model, batches[0][:1], {**options, "calibration": batches}, lambda one: accuracy(one, scored).top1


def run(case: str, folder: Path, device: str, memory: str | None) -> dict[str, Any]:
    """One case in this process."""
    import rankfold

    model, example, options, score = CASES[case](folder)
    model.to(device)
    budget = rankfold.Budget(**options.pop("budget"))
    stages: dict[str, float] = {}
    last, since = "preparing", time.perf_counter()

    def report(what: str, done: int, total: int, note: str = "", /) -> None:
        nonlocal last, since
        if what != last:
            now = time.perf_counter()
            stages[last] = round(stages.get(last, 0.0) + now - since, 1)
            last, since = what, now

    result = rankfold.compress(model, example, budget=budget, memory=memory, progress=report, **options)
    report("", 0, 1)
    if distributed.is_initialized() and distributed.get_rank():
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": round(result.seconds, 1),
        "peak_gb": round(peak, 2),
        "macs_kept": round(result.after.macs / result.before.macs, 4),
        "params_kept": round(result.after.params / result.before.params, 4),
        "error_reached": round(sum(layer.error for layer in result.plan.layers), 4),
        "score": None if score is None else round(score(result.model), 2),
        "stages": stages,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "memory": memory,
    }


def measured(
    case: str, folder: Path, source: Path, *, limit: int, device: str, processes: int, memory: str | None
) -> dict[str, Any]:
    """One case in a process of its own, with the package of a checkout."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *several, __file__, "--data", str(folder), "--here", case, "--device", device]
    command += ["--memory", memory] if memory else []
    places = os.pathsep.join([str(source / "src"), str(Path(__file__).parent)])
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": places},
            stdout=subprocess.PIPE,
            check=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"seconds": f"more than {limit}"}
    said = [json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith("{")]
    found: dict[str, Any] = next(one for one in said if one)
    return found


def main() -> None:
    """All cases, or some."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", action="append", choices=list(CASES), help="a case (repeatable)")
    arguments.add_argument("--before", type=Path, help="another checkout, to be measured in turn with this one")
    arguments.add_argument("--limit", type=int, default=1800, help="seconds after which a case is given up")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--memory", help="limit to what is taken besides networks and inputs, such as 2GB")
    arguments.add_argument("--here", choices=list(CASES), help="run one case in this process and print its record")
    arguments.add_argument("--processes", type=int, default=1, help="share the work among so many, of a thread each")
    given = arguments.parse_args()
    folder = require_data(given)
    if given.here:
        if "WORLD_SIZE" in os.environ:
            distributed.init_process_group("gloo")
        print(json.dumps(run(given.here, folder, given.device, given.memory)))
        return
    for case in given.only or CASES:
        how = {name: getattr(given, name) for name in ("limit", "device", "processes", "memory")}
        own = measured(case, folder, Path(__file__).resolve().parents[1], **how)
        before = measured(case, folder, given.before, **how) if given.before else None
        name = case if given.device == "cpu" else f"{case}, {given.device}"
        name = f"{name}, within {given.memory}" if given.memory else name
        name = name if given.processes == 1 else f"{name}, {given.processes} processes"
        keep([record(case=name, what=(CASES[case].__doc__ or "").rstrip("."), **own, before=before)])


if __name__ == "__main__":
    main()
