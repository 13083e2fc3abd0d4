"""Hugging Face models by name or directory, and inputs that a model of any modality runs on, from its configuration."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import DataError, ModelError, reason_of

TOKENS = 128
"""Tokens of an example, where the model takes so many."""
SAMPLES = 16_000
"""Samples of raw audio: a second, as most models have it."""
FRAMES = 1024
"""Frames of audio features, where the configuration does not say how many."""
SIDE = 224
"""Pixels, where the configuration does not say how many."""

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.ckpt*", "*.index.json")
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json", "spiece*")
_LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_target_positions",
    "max_source_positions",
    "max_decoder_position_embeddings",
    "max_encoder_position_embeddings",
)


def load_model(transformers: Any, name: str) -> tuple[nn.Module, str]:
    """The model in a directory, or of a name on the Hub, and what there is to say of its weights, if anything.

    Without weights in the directory they are drawn from PyTorch's global random state. Raises ModelError, in a line.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"hf:{name} cannot be loaded: the directory holds no config.json")
    with quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            known = getattr(transformers, (config.architectures or [""])[0], None)
            if folder.is_dir() and not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
                model = known._from_config(config) if known else transformers.AutoModel.from_config(config)
                return model, f"{name} holds no weights: they are random, and so is what they seem to allow"
            kind = known or transformers.AutoModel
            model, found = kind.from_pretrained(name, output_loading_info=True)
        except Exception as error:
            raise ModelError(f"hf:{name} cannot be loaded: {_reason(name, error)}") from error
    missing = sorted(found.get("missing_keys") or ())
    return model, f"{name} lacks {', '.join(missing[:3])}{', …' * (len(missing) > 3)}: random" if missing else ""


def tokenize(transformers: Any, name: str, text: str) -> list[int]:
    """The tokens of a text, with what the model's tokenizer puts around it; raises DataError where there is none."""
    tokenizer = _tokenizer(transformers, name)
    with quiet(transformers):
        return list(tokenizer(text).input_ids)


@lru_cache(maxsize=1)
def _tokenizer(transformers: Any, name: str) -> Any:
    """The tokenizer of a directory or name, read once for all the texts that follow."""
    folder = Path(name)
    if folder.is_dir() and not any(True for pattern in _VOCABULARIES for _ in folder.glob(pattern)):
        raise DataError(f"hf:{name} has no tokenizer: the directory holds none of {', '.join(_VOCABULARIES)}")
    with quiet(transformers):
        try:
            return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:
            raise DataError(f"hf:{name} has no tokenizer that can be loaded: {_reason(name, error)}") from error


def takes_named_inputs(model: nn.Module) -> bool:
    """Whether the model says, as Hugging Face's do, by which name it takes its main input."""
    return hasattr(getattr(model, "config", None), "get_text_config") and isinstance(
        getattr(model, "main_input_name", None), str
    )


def example_inputs(model: Any) -> Tensor | dict[str, Tensor]:
    """A batch of one for a model with a configuration: a tensor where one positional argument is all, else a dict.

    Numbers are standard normal from seed 0, tokens the first in order but for that of padding.
    """
    accepted = list(inspect.signature(model.forward).parameters)
    config, main = model.config, model.main_input_name
    pictures, both = getattr(config, "vision_config", None), getattr(config, "text_config", None)
    names = [main]
    if pictures and both and main == "input_ids" and "pixel_values" in accepted and not _splices_images(config):
        names.append("pixel_values")  # two encoders side by side, as in CLIP
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        names.append("decoder_input_ids")
    if not set(names) <= set(_MAKERS):
        return {name: value[:1] for name, value in model.dummy_inputs.items()}
    made = {name: _MAKERS[name](model) for name in names}
    return made[main] if len(made) == 1 and accepted[0] == main else made


def token_count(model: nn.Module, limits: tuple[str, ...] = _LIMITS) -> int:
    """How many tokens an example has: `TOKENS`, or as many as the model has positions for."""
    config: Any = model.config
    text = config.get_text_config()
    found = [value for at in (text, config) for name in limits if isinstance(value := getattr(at, name, None), int)]
    offsets = [
        padding + 1  # of RoBERTa's kind, whose positions are counted from there
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(padding := getattr(module, "padding_idx", None), int)
    ]
    return max(1, min([TOKENS, *(value - max(offsets, default=0) for value in found if value > 0)]))


def vocabulary_of(model: Any) -> int | None:
    """How many tokens the model knows, None where it takes none."""
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def _tokens(model: Any) -> Tensor:
    vocabulary, count = vocabulary_of(model) or 1, token_count(model)
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    known = [token for token in range(min(vocabulary, count + 1)) if token != padding] or [0]
    return torch.tensor([known[k % len(known)] for k in range(count)])[None]


def _pixels(model: Any) -> Tensor:
    config = model.config
    seen = next((part for name in ("vision_config", "encoder") if (part := getattr(config, name, None))), config)
    side = getattr(seen, "image_size", None) or SIDE
    sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    if isinstance(side, Mapping):
        sides = (side["height"], side["width"])
    channels = getattr(seen, "num_channels", None) or 3
    frames = getattr(seen, "num_frames", None)
    return _normal(model, *([frames] if frames else []), channels, *sides[-2:])


def _features(model: Any) -> Tensor:
    config = model.config
    bins = getattr(config, "num_mel_bins", None)
    if bins:
        return _normal(model, bins, 2 * getattr(config, "max_source_positions", FRAMES // 2))
    per_frame = getattr(config, "input_feat_per_channel", None)
    if per_frame:
        return _normal(model, FRAMES, per_frame * getattr(config, "input_channels", 1))
    return _normal(model, FRAMES, getattr(config, "feature_projection_input_dim", 80))


def _audio(model: Any) -> Tensor:
    config = model.config
    bins, length = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if bins and length and not hasattr(config, "conv_stride"):
        return _normal(model, length, bins)  # a spectrogram, taken as an image
    return _normal(model, SAMPLES)


_MAKERS = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _audio,
}


def _normal(model: nn.Module, *shape: int) -> Tensor:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _splices_images(config: Any) -> bool:
    """Whether images take the place of tokens: such a model reads text alone as well."""
    return any(getattr(config, name, None) is not None for name in ("image_token_id", "image_token_index"))


def _reason(name: str, error: Exception) -> str:
    """What went wrong, in a line that says what to do where that is known."""
    text = reason_of(error)
    if Path(name).is_dir():
        return text
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return "there is no such directory"
    if "connect" in text or "offline" in text.lower():
        return (
            "it is no directory here, not among the models downloaded before, and the Hub cannot be reached; "
            "download it first, or give a directory with config.json"
        )
    return text


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keeps the bars, reports and retries of loading off the terminal: what matters of them is returned or raised."""
    shown = transformers.utils.logging
    level, bars = shown.get_verbosity(), shown.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    shown.set_verbosity_error()
    shown.disable_progress_bar()
    hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        shown.set_verbosity(level)
        if bars:
            shown.enable_progress_bar()
        hub.setLevel(hub_level)
