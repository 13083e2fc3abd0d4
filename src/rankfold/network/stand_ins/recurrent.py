"""PyTorch's recurrent layers with a layer for what their inputs meet.

The matrices that the inputs of a layer meet, of all gates and both directions, are one matrix of gates by inputs. In
factors it is a narrow Linear in front of a recurrent layer with as few inputs; so the first factor runs as a Linear
over all steps at once, and the last one is what the recurrent kernel is given. The matrices that the state meets stay:
they are applied step by step to what they gave before, so that their errors feed back, and the kernels take them whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from rankfold.network.factorised import Factorised, carry_over_

_KERNELS = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}


class Recurrent(nn.Module):
    """What `nn.LSTM`, `nn.GRU` and `nn.RNN` compute, with `inputs`: a Linear (or its factors) per layer.

    The layers in `inputs` are called for those who watch them only; the kernels take their weights.
    """

    mode: str
    num_layers: int
    hidden_size: int
    proj_size: int
    batch_first: bool
    bidirectional: bool
    dropout: float

    def __init__(self, original: nn.RNNBase) -> None:
        super().__init__()
        self.has_bias = bool(original.bias)
        self.inputs = nn.ModuleList()
        ends = ("", "_reverse") if original.bidirectional else ("",)
        for layer in range(original.num_layers):
            own = [f"l{layer}{end}" for end in ends]
            weights, biases = (
                [one for name in own if (one := original._parameters.get(f"{kind}_{name}")) is not None]
                for kind in ("weight_ih", "bias_ih")
            )
            self.inputs.append(_joined(weights, biases))
            for name in (f"{kind}_{one}" for one in own for kind in ("weight_hh", "bias_hh", "weight_hr")):
                if name in original._parameters:
                    self.register_parameter(name, original._parameters[name])
        carry_over_(original, self)

    def forward(self, input: Any, hx: Any = None) -> Any:  # noqa: A002
        """Arguments and results of the original."""
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        batched = packed or x.ndim == 3
        if not batched:
            x = x[:, None]
            hx = None if hx is None else self._each(hx, lambda state: state[:, None])
        elif self.batch_first and not packed:
            x = x.transpose(0, 1)
        if packed and hx is not None:
            hx = self._permuted(hx, input.sorted_indices)
        sizes: Tensor | None = input.batch_sizes if packed else None
        states = self._initial(x, hx, x.shape[1] if sizes is None else int(sizes[0]))
        finals = []
        for layer in range(self.num_layers):
            x, *state = self._run(layer, x, states[layer], sizes)
            finals.append(state)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = functional.dropout(x, self.dropout)
        final = [torch.cat(parts) for parts in zip(*finals, strict=True)]
        if not batched:
            x, final = x[:, 0], [one[:, 0] for one in final]
        elif self.batch_first and not packed:
            x = x.transpose(0, 1)
        result = tuple(final) if self.mode == "LSTM" else final[0]
        if packed:
            result = self._permuted(result, input.unsorted_indices)
            return PackedSequence(x, input.batch_sizes, input.sorted_indices, input.unsorted_indices), result
        return x, result

    def flatten_parameters(self) -> None:
        """Nothing: the weights are not one block of memory here."""

    def __getattr__(self, name: str) -> Any:
        part = re.fullmatch(r"(weight|bias)_ih_l(\d+)(_reverse)?", name)
        if part is None:
            return super().__getattr__(name)
        whole = getattr(self.inputs[int(part[2])], part[1])
        return whole.chunk(1 + self.bidirectional)[part[3] is not None]

    def _run(self, layer: int, x: Tensor, state: list[Tensor], sizes: Tensor | None) -> tuple[Tensor, ...]:
        """One layer, in both directions: outputs (steps, batch, …) and final states."""
        projection = self.inputs[layer]
        if projection._forward_hooks or projection._forward_pre_hooks:
            projection(x)
        last = projection
        if isinstance(projection, Factorised):
            *stages, last = projection.children()
            for stage in stages:
                x = stage(x)
        ways = 1 + self.bidirectional
        weights = cast(Tensor, last.weight).chunk(ways)
        biases = cast(Tensor, last.bias).chunk(ways) if self.has_bias else ()
        flat: list[Tensor] = []
        for way, end in zip(range(ways), ("", "_reverse"), strict=False):
            name = f"l{layer}{end}"
            flat += [weights[way], getattr(self, f"weight_hh_{name}")]
            flat += [biases[way], getattr(self, f"bias_hh_{name}")] if self.has_bias else []
            flat += [getattr(self, f"weight_hr_{name}")] if self.proj_size else []
        hidden: Any = tuple(state) if self.mode == "LSTM" else state[0]
        options = (flat, self.has_bias, 1, 0.0, False, self.bidirectional)
        kernel = cast(Any, _KERNELS[self.mode])
        return tuple(kernel(x, hidden, *options, False) if sizes is None else kernel(x, sizes, hidden, *options))

    def _initial(self, x: Tensor, hx: Any, batch: int) -> list[list[Tensor]]:
        """For each layer its states (directions, batch, …): those given, or zeros."""
        ways = 1 + self.bidirectional
        if hx is None:
            widths = [self.proj_size or self.hidden_size, *([self.hidden_size] if self.mode == "LSTM" else [])]
            return [[x.new_zeros(ways, batch, width) for width in widths] for _ in range(self.num_layers)]
        given = hx if self.mode == "LSTM" else (hx,)
        return [[one[ways * layer : ways * (layer + 1)] for one in given] for layer in range(self.num_layers)]

    def _permuted(self, hx: Any, order: Tensor | None) -> Any:
        """States with their examples in another order."""
        if order is None:
            return hx
        return self._each(hx, lambda state: state.index_select(1, order))

    def _each(self, hx: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """States with a change made to each: an LSTM has two."""
        return tuple(map(change, hx)) if self.mode == "LSTM" else change(hx)


def _joined(weights: list[nn.Parameter], biases: list[nn.Parameter]) -> nn.Linear:
    """The matrices of one or two directions as one Linear; that of one shares its parameters."""
    made = nn.Linear(weights[0].shape[1], sum(map(len, weights)), bias=False, device="meta")
    made.weight = _stacked(weights)
    if biases:
        made.bias = _stacked(biases)
    return made


def _stacked(parameters: list[nn.Parameter]) -> nn.Parameter:
    """Parameters one below the other; the one itself where there is but one."""
    first, *others = parameters
    if not others:
        return first
    return nn.Parameter(torch.cat([one.detach() for one in parameters]), first.requires_grad)
