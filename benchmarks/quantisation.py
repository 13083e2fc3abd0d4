"""Eight bits on top: original, quantised, compressed, both, in ONNX Runtime: accuracy, bytes, and time in turns.

Static quantisation by ONNX Runtime (signed 8-bit weights per channel, unsigned activations) on 128 unlabelled inputs;
compressed to half of the MACs (ResNet-20) and to 70 % (MobileNetV2), on the same inputs. CP layers are quantised as
they are and damped. Where OpenVINO is installed, it is timed as well. `--only MODEL` runs one.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import keep, parser, record, require_data
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn
from units import images, opened

from rankfold import Budget, compress
from rankfold.evaluation import in_turns
from rankfold.files.export import folded
from rankfold.sources.data import Dataset
from rankfold.training import Geometry

NETWORKS = {
    "cifar10_resnet20": (0.5, ("spatial", "cp3", "svd")),
    "mobilenet_v2": (0.7, ("interpolative",)),
}
"""Networks with the share of their MACs that is kept, and decompositions."""
COUNT = 128
DAMPING = 3e-4
TIMED = (1, 16)


class Inputs(CalibrationDataReader):
    """Batches for ONNX Runtime to calibrate on."""

    def __init__(self, name: str, batches: list[torch.Tensor]) -> None:
        self.left = [{name: one[None].numpy()} for batch in batches for one in batch]

    def get_next(self) -> Any:
        return self.left.pop(0) if self.left else None


def main() -> None:
    """Writes the records of all networks, or of those asked for."""
    made = parser(__doc__ or "")
    made.add_argument("--only", action="append", help="a network (repeatable)")
    arguments = made.parse_args()
    folder = require_data(arguments)
    for name in arguments.only or NETWORKS:
        budget, choices = NETWORKS[name]
        model = opened(folder, name).model
        scored, batches = images(folder, name, COUNT)
        networks: dict[str, nn.Module] = {"original": model}
        for choice in choices:
            options: dict[str, Any] = {"decomposition": choice, "budget": Budget(macs=budget)}
            result = compress(model, batches[0][:1], calibration=batches, **options)
            networks[choice] = result.model
            if choice == "cp3":
                networks["cp3, damped"] = copy.deepcopy(result.model)
                Geometry(networks["cp3, damped"], model, result.plan).damp_(DAMPING)
        with tempfile.TemporaryDirectory() as place:
            _measured(name, networks, scored, batches, Path(place))


def _measured(
    name: str, networks: dict[str, nn.Module], scored: Dataset, batches: list[torch.Tensor], place: Path
) -> None:
    """Records of every network, in 32 and in 8 bits; times are shares of the original's in 32 bits."""
    files = {}
    for label, network in networks.items():
        for bits, path in _written(network, batches, place / label).items():
            files[label, bits] = path
    settings = SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    sessions = {key: InferenceSession(str(path), settings) for key, path in files.items()}
    engines = {"time_kept": [_call(one) for one in sessions.values()], "openvino_time_kept": _in_openvino(files)}
    times = {}
    for (engine, calls), batch in itertools.product(engines.items(), TIMED):
        x = batches[0][:batch].numpy()
        if calls:
            taken = in_turns([partial(call, x) for call in calls], rounds=200, warmup=5, seconds=15.0)
            times[f"{engine}_{batch}"] = [round(one / taken[0], 3) for one in taken]
    for place_of, ((label, bits), session) in enumerate(sessions.items()):
        keep(
            [
                record(
                    case=f"{name}:{label}:{bits}",
                    model=name,
                    method=label,
                    bits=bits,
                    top1=round(_top1(session, scored), 2),
                    megabytes=round(files[label, bits].stat().st_size / 1e6, 3),
                    **{key: shares[place_of] for key, shares in times.items()},
                    examples=len(scored),
                    data="CIFAR-10 test" if "cifar" in name else "ImageNet validation",
                )
            ]
        )


def _written(network: nn.Module, batches: list[torch.Tensor], stem: Path) -> dict[int, Path]:
    """The network's ONNX files, by bits."""
    plain, _ = folded(network, batches[0][:2])
    paths = {32: stem.with_suffix(".32.onnx"), 8: stem.with_suffix(".8.onnx")}
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(plain, (batches[0][:2],), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    assert program is not None
    program.save(str(paths[32]))
    prepared = stem.with_suffix(".prepared.onnx")
    quant_pre_process(str(paths[32]), str(prepared), skip_symbolic_shape=True)
    name = InferenceSession(str(prepared)).get_inputs()[0].name
    quantize_static(
        str(prepared),
        str(paths[8]),
        Inputs(name, batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return paths


def _call(session: InferenceSession) -> Callable[[Any], object]:
    """A pass over inputs."""
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def _in_openvino(files: dict[tuple[str, int], Path]) -> list[Callable[[Any], object]]:
    """Passes of the same files in OpenVINO; none where it is not installed."""
    try:
        import openvino
    except ImportError:
        return []
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return [openvino.compile_model(str(path), "CPU", threads) for path in files.values()]


def _top1(session: InferenceSession, scored: Dataset) -> float:
    """Percent of right answers."""
    right, name = 0, session.get_inputs()[0].name
    for start in range(0, len(scored), 100):
        x, y = scored.batch(start, start + 100)
        logits = np.asarray(session.run(None, {name: x.numpy()})[0])
        right += int((logits.argmax(1) == y.numpy()).sum())
    return 100 * right / len(scored)


if __name__ == "__main__":
    main()
