"""Where a network comes from: a MODEL such as `zoo:cifar10_resnet20`, and the file its weights are in."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rankfold.errors import ModelError, UnknownNameError, nearest, reason_of
from rankfold.sources import hugging_face, zoo
from rankfold.sources.data import Normalisation

FORMS = "zoo:NAME, timm:NAME, torchvision:NAME, hf:NAME or hf:DIR, package.module:factory or path/to/file.py:factory"


@dataclass(frozen=True)
class Source:
    """A network built from a MODEL spec, with what is known of its inputs.

    `vocabulary` is the number of tokens where inputs are token indices, and None where they are numbers. `input_shape`
    is None where it is unknown, or the network takes several inputs; `inputs` makes those. `tokenize` turns text into
    tokens, where the model has a tokenizer. `note` is what there is to say of its weights.
    """

    model: nn.Module
    input_shape: tuple[int, ...] | None
    normalisation: Normalisation | None
    vocabulary: int | None = None
    inputs: Callable[[], Tensor | dict[str, Tensor]] | None = None
    note: str = ""
    tokenize: Callable[[str], list[int]] | None = None

    def example_inputs(self) -> Tensor | dict[str, Tensor]:
        """A batch of one that the network runs on, a dict of keyword arguments where it takes several inputs.

        Raises ModelError where nothing says what they are.
        """
        if self.inputs:
            return self.inputs()
        if self.input_shape is None:
            raise ModelError("the model does not say what inputs it takes; give their shape, for example 3,224,224")
        return self.example(self.input_shape)

    def example(self, shape: tuple[int, ...]) -> Tensor:
        """A batch of one input of this shape: standard normal numbers from seed 0, or the first tokens in order."""
        if self.vocabulary:
            return torch.arange(math.prod(shape)).remainder(self.vocabulary).reshape(1, *shape)
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def normalised_by(
        self, channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> Normalisation:
        """The normalisation given, or the model's own, or none, which scales integer inputs to [0, 1] and no more."""
        none = Normalisation((0.0,) * channels, (1.0,) * channels, "none known: inputs in [0, 1]")
        own = self.normalisation or none
        if mean is None and std is None:
            return own
        return Normalisation(tuple(mean or own.mean), tuple(std or own.std))


def build_model(spec: str, *, seed: int = 0) -> Source:
    """The network that `spec` names, freshly initialised from `seed`, without touching the global random state.

    Raises ModelError for what cannot be built, UnknownNameError for a name that is not there.
    """
    kind, separator, name = spec.rpartition(":")
    if not separator or not kind or not name:
        raise ModelError(f"model {spec!r} is not of the form {FORMS}")
    builders = {"zoo": _from_zoo, "timm": _from_timm, "torchvision": _from_torchvision, "hf": _from_hf}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        source = builders[kind](name) if kind in builders else _from_factory(kind, name)
    source.model.eval()
    return source


def load_weights_(model: nn.Module, path: str | Path) -> None:
    """Loads a state dict into the model, in place: .safetensors, or .pt/.pth read without unpickling objects.

    Raises ModelError for a file that cannot be read, or whose names and shapes are not the model's.
    """
    file = Path(path)
    state = _read_state(file)
    own = model.state_dict()
    if state and all(name.startswith("module.") for name in state) and not any(n.startswith("module.") for n in own):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    wrong = [name for name in state if name in own and state[name].shape != own[name].shape]
    if wrong:
        name = wrong[0]
        raise ModelError(f"{file}: {name} has shape {tuple(state[name].shape)}, the model {tuple(own[name].shape)}")
    unknown = [name for name in state if name not in own]
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    if missing or unknown:
        example = (
            f"it lacks {missing[0]}" if missing else f"{unknown[0]} is not the model's ({nearest(unknown[0], own)})"
        )
        counts = f"{len(missing)} names missing, {len(unknown)} unknown"
        raise ModelError(f"{file} does not fit the model: {example} ({counts})")
    dtypes = {state[name].dtype for name in state if state[name].is_floating_point()}
    if len(dtypes) == 1:
        model.to(next(iter(dtypes)))
    model.load_state_dict(state, strict=False)


def _read_state(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ModelError(f"weights {file} do not exist")
    if file.suffix == ".safetensors":
        try:
            return dict(load_file(file))
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"weights {file} cannot be read: {error}") from error
    if file.suffix not in (".pt", ".pth"):
        raise ModelError(f"weights {file}: unknown kind {file.suffix!r}; give .safetensors, .pt or .pth")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise ModelError(
            f"weights {file} cannot be read as plain tensors: {reason_of(error)}; save its state_dict"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"weights {file} hold no state dict; save model.state_dict() there")
    return dict(content)


def _from_zoo(name: str) -> Source:
    entry = zoo.entry(name)
    return Source(entry.build(), entry.input_shape, Normalisation(entry.mean, entry.std, f"zoo:{name}"))


def _from_timm(name: str) -> Source:
    timm = optional("timm", "timm")
    if name not in timm.list_models():
        raise UnknownNameError("timm model", name, timm.list_models())
    model = timm.create_model(name, pretrained=False)
    return Source(model, *_configured(model))


def _from_torchvision(name: str) -> Source:
    models = optional("torchvision.models", "torchvision")
    if name not in models.list_models():
        raise UnknownNameError("torchvision model", name, models.list_models())
    model = models.get_model(name, weights=None)
    shape = (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    return Source(model, shape, Normalisation(zoo.IMAGENET_MEAN, zoo.IMAGENET_STD, "torchvision's presets"))


def _from_hf(name: str) -> Source:
    """A Hugging Face model by name or directory, its architecture from the configuration and its weights if any."""
    transformers = optional("transformers", "hf")
    model, note = hugging_face.load_model(transformers, name)
    source = _with_named_inputs(model, note)
    return replace(source, tokenize=partial(hugging_face.tokenize, transformers, name)) if source.vocabulary else source


def _with_named_inputs(model: nn.Module, note: str = "") -> Source:
    """A model whose inputs are made from its configuration; their shape is known where it is one alone."""
    inputs = partial(hugging_face.example_inputs, model)
    made = inputs()
    alone = made if isinstance(made, Tensor) else next(iter(made.values())) if len(made) == 1 else None
    shape = tuple(alone.shape[1:]) if alone is not None else None
    tokens = alone is not None and not alone.is_floating_point()
    return Source(model, shape, None, hugging_face.vocabulary_of(model) if tokens else None, inputs, note)


def _from_factory(module: str, name: str) -> Source:
    loaded = _load_module(module)
    factory = getattr(loaded, name, None)
    if factory is None:
        names = [known for known in vars(loaded) if not known.startswith("_")]
        raise UnknownNameError(f"factory of {module}", name, names)
    try:
        model = factory()
    except Exception as error:
        raise ModelError(f"{module}:{name}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{module}:{name}() returned {type(model).__name__}, not a torch.nn.Module")
    if hugging_face.takes_named_inputs(model):
        return _with_named_inputs(model)
    return Source(model, *_configured(model))


def _load_module(module: str) -> ModuleType:
    if not module.endswith(".py"):
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise ModelError(f"module {module!r} cannot be imported: {error}; MODEL is {FORMS}") from error
    path = Path(module)
    if not path.is_file():
        raise ModelError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(f"rankfold_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} cannot be loaded as Python")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:
        raise ModelError(f"{path} failed when it was loaded: {type(error).__name__}: {error}") from error
    return loaded


def _configured(model: nn.Module) -> tuple[tuple[int, ...] | None, Normalisation | None]:
    """Input shape and normalisation from a model's own configuration, as timm's models carry it."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config: Any = getattr(model, attribute, None)
        if isinstance(config, Mapping) and config.get("input_size"):
            normalisation = None
            if config.get("mean") and config.get("std"):
                normalisation = Normalisation(tuple(config["mean"]), tuple(config["std"]), f"the model's {attribute}")
            return tuple(config["input_size"]), normalisation
    return None, None


def optional(module: str, extra: str) -> Any:
    """An optional package, or one line on how to get it."""
    complete_torchvision()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelError(f"this model needs {extra}: pip install 'rankfold[{extra}]' ({error})") from error
    except RuntimeError as error:
        raise ModelError(f"{module} does not work beside torch {torch.__version__}: {error}") from error


def complete_torchvision() -> None:
    """Makes torchvision importable where its compiled part was built for another torch.

    Then two operators of its detection models are missing, and importing it, or anything that imports it (timm,
    transformers), fails. Declaring them is enough: no classifier calls them.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):
                torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou) -> Tensor")
