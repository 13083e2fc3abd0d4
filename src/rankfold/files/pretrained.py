"""A compressed Hugging Face model as a directory that transformers loads.

Where the configuration can say all there is (widths that are the same in every layer), the ordinary class loads it, and
rankfold is not needed. Otherwise `import rankfold` has to come first: the configuration names the quantisation method
"rankfold" and holds the plan. Without it loading ends with an error (`quantizer.with_stops`).
"""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import uuid
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from rankfold.errors import ArtifactError, ModelError
from rankfold.files.artifact import check_target, load, load_plan, move_into_place, plan_of
from rankfold.files.original import rebuild
from rankfold.network.copies import unwrapped
from rankfold.pipeline import Result
from rankfold.plan import Plan
from rankfold.sources.hugging_face import quiet, takes_named_inputs

SHARD = "5GB"
"""Largest file of weights, unless said otherwise."""


def save_pretrained(
    saved: Result | nn.Module, directory: str | Path, *, tokenizer: Any = None, max_shard_size: str = SHARD
) -> Path:
    """Writes a compressed Hugging Face model to a directory for `from_pretrained`, and returns its path.

    `saved` is a result of `compress`, or a model that knows its plan. The generation configuration goes with it, and
    the tokenizer: the one that is given, or that of the directory or name that the model was loaded from, where it has
    one. Written beside its place and moved there in one step, in place of an earlier one. Raises ModelError for models
    that are not transformers', ArtifactError where the directory holds something else or cannot be written.
    """
    model = cast(Any, unwrapped(saved.model if isinstance(saved, Result) else saved))
    plan = saved.plan if isinstance(saved, Result) else plan_of(saved)
    if not takes_named_inputs(model) or not hasattr(model, "save_pretrained"):
        raise ModelError(f"{type(model).__name__} is not a model of transformers; save it with rankfold.save")
    target = Path(directory).absolute()
    check_target(target, is_ours)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    config, found = model.config, plain_config(model, plan)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        state = model.state_dict()
        model.config = copy.deepcopy(found or config)
        if found is None:
            from rankfold.files.quantizer import PlanConfig, with_stops

            model.config.quantization_config = PlanConfig(plan.to_json())
            state = with_stops(state, plan)
        keeps_names = "save_original_format" in signature(model.save_pretrained).parameters
        with quiet(importlib.import_module("transformers")):
            model.save_pretrained(
                partial,
                state_dict=state,
                max_shard_size=max_shard_size,
                **({"save_original_format": False} if keeps_names else {}),
            )
            _save_tokenizer(tokenizer, config, partial)
        (partial / "README.md").write_text(card(model, plan, plain=found is not None), encoding="utf-8")
        move_into_place(partial, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"cannot write {target}: {reason}; nothing was changed") from error
    finally:
        model.config = config
        shutil.rmtree(partial, ignore_errors=True)
    return target


def finalize_pretrained(directory: str | Path, out: str | Path) -> Path:
    """Writes the model that `compress` or `finetune` saved in `directory` as `save_pretrained` does."""
    source, _ = rebuild(load_plan(directory), directory)
    return save_pretrained(load(directory, source.model), out)


def plain_config(model: Any, plan: Plan) -> Any:
    """A configuration by which the model's own class has the compressed model's weights; None where there is none.

    Every number in the configuration that is the size of a set of channels is tried at its width in the plan.
    """
    widths = {(one.channels.size, len(one.kept)) for one in plan.narrowings}
    if plan.decomposed or plan.opened or len({size for size, _ in widths}) < len(widths):
        return None
    changed = copy.deepcopy(model.config)
    for size, width in widths:
        for name, value in changed.to_dict().items():
            if type(value) is int and value == size:
                setattr(changed, name, width)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    try:
        with torch.device("meta"):
            own = type(model)(changed).state_dict()
    except Exception:  # a configuration that the class does not take is no way to say it
        return None
    return changed if {name: tensor.shape for name, tensor in own.items()} == wanted else None


def is_ours(target: Path) -> bool:
    """Whether a directory was written here before."""
    try:
        return CARD_MARK in (target / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _save_tokenizer(tokenizer: Any, config: Any, folder: Path) -> None:
    """Saves a tokenizer beside the model; that of the original, if there is one, where none is given."""
    name = getattr(config, "_name_or_path", "")
    if tokenizer is None and name:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        except Exception:  # there is none, or it has moved: the model is what was asked for
            return
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


CARD_MARK = "library_name: transformers\ntags:\n- rankfold\n"


def card(model: Any, plan: Plan, *, plain: bool) -> str:
    """A model card: what was done, in numbers, and how it is loaded."""
    kind = type(model).__name__
    origin = getattr(model.config, "_name_or_path", "") or kind
    shares = ", ".join(f"{share:.1%} of the {unit}" for unit, share in plan.after.kept(plan.before).items())
    needed = "" if plain else "import rankfold  # reads the plan in config.json\n"
    settings = {name: value for name, value in plan.settings.items() if not isinstance(value, (dict, list))}
    return f"""---
{CARD_MARK}---

# {kind}, compressed

Made by rankfold from `{origin}`: {shares} are kept.
{len(plan.decomposed)} layers are products of smaller ones, {len(plan.narrowings)} sets of hidden channels are narrower.

```python
{needed}from transformers import {kind}
model = {kind}.from_pretrained("this directory")
```

Settings, from the plan:

```json
{json.dumps(settings, indent=2)}
```
"""
