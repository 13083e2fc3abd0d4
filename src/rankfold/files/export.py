"""The last step: batch norms folded into the layers before them, and the network written as one file for deployment.

The file is PyTorch's own exported program (.pt2): `torch.export.load(path).module()` runs it, for any batch size, and
needs neither this package nor the code of the network.
"""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from rankfold.errors import ArtifactError, ModelError
from rankfold.files.artifact import load, load_plan
from rankfold.files.original import rebuild
from rankfold.network.copies import duplicate
from rankfold.network.kinds import known_kind
from rankfold.network.passes import output_of, run
from rankfold.network.tracing import followed

_FOLDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TOLERANCE = 1e-3
"""Largest difference of outputs, relative to the largest output, that folding and exporting may make."""


@dataclass(frozen=True)
class Exported:
    """A file, its size, the batch norms that were folded, and the largest difference of outputs relative to them."""

    path: Path
    bytes: int
    folded: int
    difference: float

    def as_dict(self) -> dict[str, Any]:
        """The same in JSON's types."""
        return {**asdict(self), "path": str(self.path)}


def finalize(directory: str | Path, out: str | Path) -> Exported:
    """Writes the model saved in `directory` to one .pt2 file, batch norms folded, and checks what was written.

    Raises ArtifactError where the file cannot be written, ModelError where the network cannot be exported.
    """
    target = Path(out).absolute()
    if target.suffix != ".pt2":
        raise ArtifactError(f"{target.name}: an exported program ends in .pt2; name it so")
    plan = load_plan(directory)
    source, shape = rebuild(plan, directory)
    student = load(directory, source.model)
    example = source.example(shape)
    plain, count = folded(student, example)
    pair = torch.cat([example, example.flip(-1)])
    partial = target.with_name(f".{uuid.uuid4().hex[:8]}.{target.name}")
    try:
        program = torch.export.export(plain, (pair,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, partial)
        written = torch.export.load(partial).module()
        difference = _difference(output_of(run(student, pair)), output_of(written(pair)))
        if difference > TOLERANCE:
            raise ModelError(f"the exported program differs from the model by {difference:.2g}: please report this")
        partial.replace(target)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}; nothing was changed") from error
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        raise ModelError(f"the network cannot be exported: {str(error).strip().splitlines()[0]}") from error
    finally:
        partial.unlink(missing_ok=True)
    return Exported(target, target.stat().st_size, count, difference)


def folded(model: nn.Module, example: Tensor) -> tuple[nn.Module, int]:
    """A copy in evaluation mode without the batch norms that follow a layer of their own, and how many these were."""
    copied = duplicate(model).eval()
    layers = [module for module in copied.modules() if type(module) in _FOLDED]
    order, followers = followed(copied, layers, lambda: run(copied, example))
    calls = Counter(order)
    names = {module: name for name, module in copied.named_modules()}
    folds = {layer: norm for layer, norm in followers.items() if calls[layer] == 1}
    for layer, norm_name in folds.items():
        norm = cast(Any, copied.get_submodule(norm_name))
        if isinstance(layer, nn.Linear):
            fused: nn.Module = fuse_linear_bn_eval(layer, norm)
        else:
            fused = fuse_conv_bn_eval(cast(Any, layer), norm, known_kind(layer).transposed)
        _replace_(copied, names[layer], fused)
        _replace_(copied, norm_name, nn.Identity())
    return copied, len(folds)


def _replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest entry of the first."""
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))
