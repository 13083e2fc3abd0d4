"""The last step: batch norms folded into the layers before them, and the network written as one file for deployment.

The file is PyTorch's own exported program (.pt2), which `torch.export.load(path).module()` runs, or ONNX (.onnx), which
ONNX Runtime and other engines do. Neither needs this package, nor the code of the network. Both take any number of
examples, and tokens any length, where the network does; what was written is run and compared with the model.
"""

from __future__ import annotations

import inspect
import io
import math
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from rankfold.errors import ArtifactError, ModelError, reason_of
from rankfold.evaluation import in_turns
from rankfold.files.artifact import load, load_plan
from rankfold.files.original import load_original_, rebuild
from rankfold.network.copies import duplicate
from rankfold.network.kinds import known_kind
from rankfold.network.passes import Inputs, arguments_of, evaluating, run, tensors_in
from rankfold.network.tracing import followed

_FOLDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TOLERANCE = 1e-3
"""Largest difference of outputs, relative to the largest output, that folding and exporting may make."""
LARGEST_ONNX = 2**31
"""Bytes of weights that one ONNX file holds."""
ROUNDS, SECONDS = 20, 2.0
"""Passes in which a file is timed beside the original's, at most, and about how long all may take."""


@dataclass(frozen=True)
class Exported:
    """A file, its size, the batch norms that were folded, and the largest difference of outputs relative to them.

    `free` says whether it takes other numbers of examples than two. `latency_ms` are median milliseconds of ONNX files,
    of the original's and the compressed network's, by turns; empty for others.
    """

    path: Path
    bytes: int
    folded: int
    difference: float
    free: bool = True
    latency_ms: tuple[float, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """The same in JSON's types."""
        times = dict(zip(("original", "compressed"), self.latency_ms, strict=False))
        return {**asdict(self), "path": str(self.path), "latency_ms": times}


def finalize(directory: str | Path, out: str | Path, *, weights: str | Path | None = None) -> Exported:
    """Writes the model saved in `directory` to one file, .pt2 or .onnx, and checks what was written.

    `weights` are the original's, if they have moved; it is only timed, so that they are not needed. Raises
    ArtifactError where the file cannot be written, ModelError where the network cannot be exported.
    """
    target = Path(out).absolute()
    if target.suffix not in _WRITERS:
        raise ArtifactError(f"{target.name}: the file's ending says what is written; give one of {', '.join(_WRITERS)}")
    plan = load_plan(directory)
    source, shape = rebuild(plan, directory)
    student = load(directory, source.model)
    example = source.example(shape) if shape else source.example_inputs()
    plain, count = folded(student, example)
    write, read = _WRITERS[target.suffix]
    unfinished = target.with_name(f".{uuid.uuid4().hex[:8]}.{target.name}")
    beside = unfinished.with_name(f"{unfinished.stem}.original{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        doubled = _copies(example, 2)
        write(plain, doubled, unfinished)
        call = read(unfinished)
        difference = _difference(_outputs(student, doubled), call(doubled))
        if not difference <= TOLERANCE:
            raise ModelError(
                f"the network computes something else once exported: its outputs differ by {difference:.2g}"
            )
        times: tuple[float, ...] = ()
        if target.suffix == ".onnx":
            load_original_(source.model, plan, weights, needed=False)
            write(folded(source.model, example)[0], doubled, beside)
            calls = [partial(one, doubled) for one in (read(beside), call)]
            times = in_turns(calls, rounds=ROUNDS, warmup=1, seconds=SECONDS)
        unfinished.replace(target)
        free = _agrees(student, call, _copies(example, 3))
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}; nothing was changed") from error
    finally:
        for file in (unfinished, beside):
            file.unlink(missing_ok=True)
    return Exported(target, target.stat().st_size, count, difference, free, times)


def folded(model: nn.Module, example: Inputs) -> tuple[nn.Module, int]:
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


class _Plain(nn.Module):
    """A network that gives its floating tensors alone, and keeps no cache of a pass for the next."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = getattr(model, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        found = tuple(one for one in tensors_in(self.model(*args, **kwargs)) if one.is_floating_point())
        return found[0] if len(found) == 1 else found


def _exported(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """The program of a network, free in the number of examples and tokens; raises ModelError where there is none."""
    args, kwargs = arguments_of(inputs)
    named = {"args": tuple(map(_free, args))} if args else {}
    shapes = {**named, **({"kwargs": {name: _free(one) for name, one in kwargs.items()}} if kwargs else {})}
    try:
        with evaluating(model), torch.no_grad():
            return torch.export.export(_Plain(model), args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise ModelError(f"the network cannot be exported: {reason_of(error)}") from error


def _free(value: Any) -> Any:
    """Which sizes of an input may be others: the number of examples, and that of tokens."""
    if not isinstance(value, Tensor) or not value.ndim:
        return None
    places = (0,) if value.is_floating_point() else range(value.ndim)
    return dict.fromkeys(places, torch.export.Dim.AUTO)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps what exporters warn of their own parts off the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@_quietly()
def _write_program(model: nn.Module, inputs: Inputs, path: Path) -> None:
    whole = io.BytesIO()  # written at once: on a full disk PyTorch's own writer ends the process
    torch.export.save(_exported(model, inputs), whole)
    path.write_bytes(whole.getbuffer())


def _read_program(path: Path) -> Callable[[Inputs], list[Tensor]]:
    module = torch.export.load(path).module()

    def call(inputs: Inputs) -> list[Tensor]:
        args, kwargs = arguments_of(inputs)
        with torch.no_grad():
            return tensors_in(module(*args, **kwargs))

    return call


@_quietly()
def _write_onnx(model: nn.Module, inputs: Inputs, path: Path) -> None:
    size = sum(one.nbytes for one in model.state_dict().values())
    if size >= LARGEST_ONNX:
        raise ModelError(f"its weights take {size / 2**30:.1f} GiB, and one ONNX file holds less than 2; write .pt2")
    _needs("onnxscript")
    program = _exported(model, inputs)
    try:
        written = torch.onnx.export(program, dynamo=True, verbose=False, input_names=_names(model, inputs))
        cast(Any, written).save(str(path), external_data=False)
    except OSError:
        raise
    except Exception as error:
        raise ModelError(f"{_place(program, error)} cannot be written as ONNX: {reason_of(error)}") from error


def _place(program: torch.export.ExportedProgram, error: BaseException) -> str:
    """Where the exporter stumbled: the module of the first operator that it names, or the network."""
    told, cause = "", cast("BaseException | None", error)
    while cause is not None:
        told, cause = f"{told}{cause}\n", cause.__cause__ or cause.__context__
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    named = [node for node in calls if f"%{node.name} " in told]
    for node in named or calls:
        if named or str(node.target) in told:
            stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            name = stack[-1].removeprefix("model").removeprefix(".") if stack else ""
            return f"{name or 'the network'}: its operator {node.target}"
    return "the network"


def _read_onnx(path: Path) -> Callable[[Inputs], list[Tensor]]:
    runtime = _needs("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def call(inputs: Inputs) -> list[Tensor]:
        given = [one.detach().cpu().numpy() for one in tensors_in(list(arguments_of(inputs)))]
        return [torch.from_numpy(one) for one in session.run(None, dict(zip(names, given, strict=True)))]

    return call


_WRITERS: dict[
    str, tuple[Callable[[nn.Module, Inputs, Path], None], Callable[[Path], Callable[[Inputs], list[Tensor]]]]
]
_WRITERS = {".pt2": (_write_program, _read_program), ".onnx": (_write_onnx, _read_onnx)}


def _names(model: nn.Module, inputs: Inputs) -> list[str]:
    """What a network's own code calls its inputs, of those that are tensors."""
    args, kwargs = arguments_of(inputs)
    places = list(inspect.signature(model.forward).parameters)
    named = {**dict(zip(places, args, strict=False)), **kwargs}
    return [name for name, value in named.items() if isinstance(value, Tensor)]


def _needs(package: str) -> Any:
    """An optional package; raises ModelError with what to install where it is not there."""
    try:
        return __import__(package)
    except ImportError as error:
        raise ModelError(f"ONNX files need {package}: pip install 'rankfold[onnx]' ({error})") from error


def _copies(inputs: Inputs, count: int) -> Inputs:
    """Inputs with so many examples of the same kind: the first ones, shifted along their last axis."""

    def more(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        return torch.cat([value[:1].roll(shift, -1) for shift in range(count)])

    args, kwargs = arguments_of(inputs)
    if kwargs:
        return {name: more(one) for name, one in kwargs.items()}
    return tuple(map(more, args))


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """A network's floating outputs, as a file gives them."""
    plain = _Plain(duplicate(model))
    return tensors_in(run(plain, inputs))


def _agrees(model: nn.Module, call: Callable[[Inputs], list[Tensor]], inputs: Inputs) -> bool:
    """Whether a file takes other inputs, and gives what the model does."""
    try:
        return _difference(_outputs(model, inputs), call(inputs)) <= TOLERANCE
    except Exception:  # each engine has errors of its own for sizes that it does not take
        return False


def _replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest entry of the first; infinite where there are not as many."""
    if [a.shape for a in one] != [b.shape for b in other]:
        return math.inf
    apart = [float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in zip(one, other, strict=True)]
    return max(apart, default=math.inf)
