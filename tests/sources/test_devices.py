"""Devices: those that are named, and networks that lie on another one than their inputs."""

from __future__ import annotations

import pytest
import torch
from command_line import run
from torch import nn

from rankfold import Budget, ModelError, compress
from rankfold.network.passes import device_of
from rankfold.sources.devices import open_device

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


def test_the_device_is_that_of_the_name():
    assert open_device("cpu") == torch.device("cpu")
    assert open_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "", "meta"])
def test_one_that_is_not_there_is_a_line(name: str):
    with pytest.raises(ModelError, match=r"cannot be used here: [^\n]+; give cpu, or auto$"):
        open_device(name)


def test_the_command_line_says_so(tmp_path, capsys, monkeypatch):
    command = ["compress", "zoo:cifar10_resnet20", "--budget", "macs=0.5", "--device", "cuda:99"]
    code, _, err = run(capsys, monkeypatch, *command, "--out", str(tmp_path / "small"))
    assert code == 2
    assert "device 'cuda:99' cannot be used here" in err
    assert not (tmp_path / "small").exists()


def test_weights_on_several_devices_have_none(small_cnn: nn.Module):
    assert device_of(small_cnn) == torch.device("cpu")
    assert device_of(nn.ReLU()) is None
    assert device_of(nn.Linear(2, 2, device="meta")) is None


@NO_GPU
@pytest.mark.parametrize("decomposition", ["tucker", "cp3", "interpolative", "auto"])
def test_a_network_on_a_gpu_is_compressed_there(decomposition: str, small_cnn: nn.Module):
    batches = [torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    options = {"decomposition": decomposition, "budget": Budget(macs=0.5), "calibration": batches, "refine": 1}
    here = compress(small_cnn, batches[0][:1], **options)
    there = compress(small_cnn.cuda(), batches[0][:1], **options)
    assert {tensor.device.type for tensor in there.model.state_dict().values()} == {"cuda"}
    assert there.after.macs <= 0.5 * there.before.macs
    assert there.plan.settings["objective"] == pytest.approx(here.plan.settings["objective"], rel=0.05)
