"""Small networks whose weights lie in packed, wrapped or computed form; the tests of opening and rehearsing share them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from rankfold.sources.models import complete_torchvision

complete_torchvision()


class Run(nn.Module):
    """Some parts, and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


def tagger(**options: Any) -> nn.Module:
    def forward(s: Run, tokens: Tensor) -> Tensor:
        return s.head(s.rnn(s.embed(tokens))[0])

    rnn = nn.LSTM(32, 24, batch_first=True, **options)
    width = (2 if options.get("bidirectional") else 1) * (options.get("proj_size") or 24)
    return Run(forward, embed=nn.Embedding(60, 32), rnn=rnn, head=nn.Linear(width, 40))


def reversed_gru() -> nn.Module:
    """A recurrent layer that is given sequences of several lengths, and its last state read alone."""

    def forward(s: Run, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return s.head(s.rnn(packed)[1].transpose(0, 1).flatten(1))

    return Run(forward, rnn=nn.GRU(32, 24, 2, bidirectional=True), head=nn.Linear(96, 40))


def decoder() -> nn.Module:
    layer = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerDecoder(layer, 2)


def masked_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Run(lambda s, x, hidden: s.encoder(x, src_key_padding_mask=hidden), encoder=encoder)


def pooled() -> nn.Module:
    """Attention of one learnt query to keys and values of other sizes."""
    attention = nn.MultiheadAttention(32, 4, kdim=24, vdim=40, add_bias_kv=True)
    query = nn.Parameter(torch.randn(1, 1, 32))
    return Run(lambda s, k, v: s.pool(s.query.expand(-1, k.shape[1], -1), k, v)[0], pool=attention, query=query)


class Experts(nn.Module):
    """Experts in two tensors, one multiplied by as it is, one transposed, chosen by what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.up = nn.Parameter(torch.randn(4, 32, 48) / 6)
        self.down = nn.Parameter(torch.randn(4, 32, 48) / 6)

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for number in range(4):
            rows = x[chosen == number]
            out[chosen == number] = functional.linear((rows @ self.up[number]).relu(), self.down[number])
        return out


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=40, num_local_experts=3))


def vocoder() -> nn.Module:
    """Weight norms, old and new, on convolutions and transposed ones."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(16, 32, 3, padding=1, padding_mode="reflect")),
        nn.LeakyReLU(),
        torch.nn.utils.weight_norm(nn.ConvTranspose1d(32, 24, 4, stride=2, padding=1)),
        nn.LeakyReLU(),
        nn.Conv1d(24, 24, 3),
    )


def critic() -> nn.Module:
    """Spectral norms, and a pruned head."""
    head = nn.Linear(24 * 16, 32)
    prune.l1_unstructured(head, "weight", 0.3)
    first = parametrizations.spectral_norm(nn.Conv2d(3, 24, 3, stride=2, padding=1))
    return nn.Sequential(first, nn.ReLU(), nn.Flatten(), head, torch.nn.utils.spectral_norm(nn.Linear(32, 32)))


def standardised() -> nn.Module:
    from timm.layers import Conv2dSame, ScaledStdConv2dSame, StdConv2d

    layers = [ScaledStdConv2dSame(3, 24, 3, stride=2), StdConv2d(24, 32, 3, padding=1), Conv2dSame(32, 32, 3, stride=2)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def compiled() -> nn.Module:
    body = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    return nn.Sequential(nn.Linear(32, 32), torch.compile(body, backend="eager"))


@dataclass(frozen=True)
class Packed:
    """A network, what it is called with, and the forms in which its parts are opened."""

    build: Callable[[], nn.Module]
    inputs: Any
    forms: dict[str, str]
    options: dict[str, Any] | None = None

    def made(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().eval()


def random_(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


TOKENS = torch.arange(24).reshape(2, 12)
PADDED = torch.arange(9) > torch.tensor([[8], [5]])
LAYERS = ("layers.0", "layers.1")

PACKED: dict[str, Packed] = {
    "lstm": Packed(lambda: tagger(num_layers=2), TOKENS, {"rnn": "recurrent"}),
    "lstm-both-ways": Packed(lambda: tagger(bidirectional=True, proj_size=16), TOKENS, {"rnn": "recurrent"}),
    "gru-of-lengths": Packed(reversed_gru, (random_(3, 7, 32), torch.tensor([4, 7, 2])), {"rnn": "recurrent"}),
    "decoder": Packed(
        decoder,
        (random_(2, 5, 32), random_(2, 7, 32)),
        {f"{layer}.{name}": "attention" for layer in LAYERS for name in ("self_attn", "multihead_attn")},
    ),
    "encoder": Packed(
        masked_encoder, (random_(2, 9, 32), PADDED), {f"encoder.{layer}.self_attn": "attention" for layer in LAYERS}
    ),
    "pooled": Packed(pooled, (random_(6, 2, 24), random_(6, 2, 40)), {"pool": "attention"}),
    "experts": Packed(Experts, random_(40, 32), {"up": "stack", "down": "stack"}),
    "mixtral": Packed(
        mixtral,
        {"input_ids": TOKENS},
        {f"model.layers.0.mlp.experts.{name}": "stack" for name in ("gate_up_proj", "down_proj")},
    ),
    "vocoder": Packed(vocoder, random_(2, 16, 14), {"0": "weight", "2": "weight"}),
    "critic": Packed(critic, random_(2, 3, 8, 8), {"0": "weight", "3": "weight", "4": "weight"}),
    "standardised": Packed(standardised, random_(2, 3, 15, 16), {"0": "weight", "2": "weight", "4": "weight"}),
    "compiled": Packed(compiled, random_(3, 32), {"1": "compiled"}),
}
