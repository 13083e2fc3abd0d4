"""Shared fixtures. Tests that need real networks take the folder of RANKFOLD_DATA, and are skipped without it."""

from __future__ import annotations

import os
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from hypothesis import settings

from rankfold.sources import zoo
from rankfold.sources.models import load_weights_

settings.register_profile("rankfold", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("rankfold")
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


@pytest.fixture(scope="session")
def data() -> Path:
    folder = os.environ.get("RANKFOLD_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set RANKFOLD_DATA to the folder of real networks and data")
    return Path(folder)


@pytest.fixture(scope="session")
def resnet20(data: Path) -> torch.nn.Module:
    model = zoo.build("cifar10_resnet20")
    load_weights_(model, data / "weights" / "cifar10_resnet20.safetensors")
    return model


@pytest.fixture
def small_cnn() -> torch.nn.Module:
    return networks.small_cnn()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    np.savez(path, x=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), y=rng.integers(0, 10, 40))
    return path
