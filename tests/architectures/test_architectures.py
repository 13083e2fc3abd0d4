"""A dozen of the architectures of benchmarks/architectures.py: compressed, run, saved, loaded and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo_of_architectures import ARCHITECTURES, Architecture

from rankfold import Budget, compress, load, save
from rankfold.network.passes import arguments_of, run, tensors_in
from rankfold.sources.models import complete_torchvision

complete_torchvision()


@pytest.mark.parametrize("one", [one for one in ARCHITECTURES.values() if one.tested], ids=lambda one: one.name)
def test_it_is_compressed_saved_loaded_and_exported(one: Architecture, tmp_path: Path):
    model, inputs = one.build()
    wanted = tensors_in(run(model, inputs))
    result = compress(model, inputs, decomposition="svd", budget=Budget(params=0.9), calibration="none")
    assert result.after.params <= 0.9 * result.before.params
    outputs = tensors_in(run(result.model, inputs))
    assert [output.shape for output in outputs] == [output.shape for output in wanted]
    assert all(bool(output.isfinite().all()) for output in outputs)
    loaded = load(save(result, tmp_path / "small"), one.build(seed=1)[0])
    assert all(torch.equal(*pair) for pair in zip(tensors_in(run(loaded, inputs)), outputs, strict=True))
    args, kwargs = arguments_of(inputs)
    torch.export.export(loaded, args, kwargs, strict=False)
