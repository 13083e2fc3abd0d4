"""Inputs made from the network: reproducible, spectrally like images, and closer to what batch norms hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankfold.synthetic import pink_noise, synthetic_inputs


@pytest.fixture
def normed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    images = 2 * pink_noise(64, (3, 16, 16), torch.Generator().manual_seed(9)) + 0.7
    model.train()
    for _ in range(40):
        model(images)
    return model.eval()


def distance(model: nn.Module, x: torch.Tensor) -> float:
    found = []

    def compare(module: nn.BatchNorm2d, args: tuple[torch.Tensor]) -> None:
        found.append(float(((args[0].mean((0, 2, 3)) - module.running_mean).square() / module.running_var).mean()))

    handles = [m.register_forward_pre_hook(compare) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return sum(found)


def test_amplitude_falls_with_frequency_and_colours_go_together():
    noise = pink_noise(64, (3, 32, 32), torch.Generator().manual_seed(0))
    assert noise.shape == (64, 3, 32, 32)
    assert float(noise.std()) == pytest.approx(1, abs=1e-4)
    spectrum = torch.fft.fft2(noise).abs().square().mean((0, 1))
    assert float(spectrum[0, 2]) / float(spectrum[0, 8]) == pytest.approx(16, rel=0.5)  # power like 1/f²
    correlation = torch.corrcoef(noise.movedim(1, 0).flatten(1))
    assert float(correlation[0, 1]) == pytest.approx(0.9, abs=0.05)


def test_inputs_come_closer_to_the_statistics_and_are_the_same_for_the_same_seed(normed: nn.Module):
    normed.train()
    before = [p.clone() for p in (*normed.parameters(), *normed.buffers())]
    found = synthetic_inputs(normed, (3, 16, 16), 140, seed=1, steps=20)
    assert [len(batch) for batch in found] == [128, 12]
    assert all(torch.equal(a, b) for a, b in zip(before, (*normed.parameters(), *normed.buffers()), strict=True))
    assert normed.training
    assert not any(module._forward_pre_hooks for module in normed.modules())
    normed.eval()
    start = pink_noise(128, (3, 16, 16), torch.Generator().manual_seed(1))
    assert distance(normed, found[0]) < 0.5 * distance(normed, start)
    again = synthetic_inputs(normed, (3, 16, 16), 140, seed=1, steps=20)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    other = synthetic_inputs(normed, (3, 16, 16), 140, seed=2, steps=1)
    assert not torch.equal(found[0], other[0])


def test_a_network_without_batch_norms_gets_noise(small_cnn: nn.Module):
    (found,) = synthetic_inputs(small_cnn, (3, 8, 8), 16)
    assert torch.equal(found, pink_noise(16, (3, 8, 8), torch.Generator().manual_seed(0)))
    assert pink_noise(4, (7,), torch.Generator()).shape == (4, 7)
