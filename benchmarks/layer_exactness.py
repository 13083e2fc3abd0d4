"""Each decomposition's factorised ResNet-20 layers against the dense layer with the reconstructed weight, in float32.

For every convolution at about half its parameters: the relative error of the outputs on standard normal inputs.
"""

from __future__ import annotations

import copy

import torch
from common import network, parser, record, require_data, write
from torch import nn

from rankfold.decompositions import DECOMPOSITIONS, fit, reconstruct, wiring_of
from rankfold.network.finding import find_layers
from rankfold.network.kinds import factorised, stage_weights, weight_of
from rankfold.search.candidates import measure_layer


def main() -> None:
    """Measures the largest relative error per decomposition and records it."""
    folder = require_data(parser(__doc__ or "").parse_args())
    model = network(folder, "cifar10_resnet20", "cifar10_resnet20", "cifar10/test.npz")[0].model
    generator = torch.Generator().manual_seed(0)
    records = []
    for name in DECOMPOSITIONS:
        worst = 0.0
        layers = [layer for layer in find_layers(model, torch.zeros(1, 3, 32, 32)).found if layer.kind == "Conv2d"]
        for layer in layers:
            module = model.get_submodule(layer.name)
            assert isinstance(module, nn.Conv2d)
            curve = measure_layer(layer, weight_of(module), (name,), units=("params",))
            shares = torch.tensor(curve.costs["params"]) / layer.dense.params
            ranks = curve.ranks[1 + int((shares[1:] - 0.5).abs().argmin())]
            wiring = wiring_of(name, layer.shape)
            factors = fit(name, weight_of(module), layer.shape, ranks, sweeps=5)
            weights = stage_weights(module, wiring, factors)
            stages, twin = factorised(module, wiring, ranks, weights), copy.deepcopy(module)
            x = torch.randn(4, module.in_channels, 16, 16, generator=generator)
            with torch.no_grad():
                twin.weight.copy_(reconstruct(wiring, factors).reshape(twin.weight.shape))
                expected = twin(x)
                worst = max(worst, float((stages(x) - expected).norm() / expected.norm()))
        records.append(record(model="cifar10_resnet20", method=name, layers=len(layers), worst_relative_error=worst))
    write(records)


if __name__ == "__main__":
    main()
