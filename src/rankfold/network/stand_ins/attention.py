"""PyTorch's multi-head attention with a layer for every projection (Vaswani et al., arXiv 1706.03762, section 3.2).

`nn.MultiheadAttention` keeps its projections in one packed tensor and reads them past any layer. The stand-in computes
the same from layers of its own, which can be decomposed.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.network.factorised import carry_over_


class Attention(nn.Module):
    """What `nn.MultiheadAttention` computes, masks and all, with `in_proj` or `q_proj`, `k_proj` and `v_proj`.

    With one layer for all three, self-attention calls it once; other attention calls it for every input that differs
    and takes its part of the outputs.
    """

    _qkv_same_embed_dim = False  # keeps PyTorch's fused encoder layer from reading weights that are not there
    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool

    def __init__(self, original: nn.MultiheadAttention, *, packed: bool) -> None:
        super().__init__()
        bias = original.in_proj_bias
        biases = [None] * 3 if bias is None else _thirds(bias)
        if original.in_proj_weight is not None and packed:
            self.in_proj: nn.Module | None = _linear(original.in_proj_weight, bias)
        else:
            self.in_proj = None
            whole = original.in_proj_weight
            weights = (
                (original.q_proj_weight, original.k_proj_weight, original.v_proj_weight)
                if whole is None
                else _thirds(whole)
            )
            self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj: nn.Module = original.out_proj
        self.register_parameter("bias_k", cast("nn.Parameter | None", original.bias_k))
        self.register_parameter("bias_v", cast("nn.Parameter | None", original.bias_v))
        carry_over_(original, self)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The packed projections, composed anew, where there are such."""
        return None if self.in_proj is None else cast(Tensor, self.in_proj.weight)

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The packed biases."""
        if self.in_proj is not None:
            return cast("Tensor | None", self.in_proj.bias)
        biases = [cast("Tensor | None", one.bias) for one in (self.q_proj, self.k_proj, self.v_proj)]
        return None if any(one is None for one in biases) else torch.cat(cast("list[Tensor]", biases))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results of `nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("need attn_mask if specifying the is_causal hint")
        batched = query.ndim == 3
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = q[None], k[None], v[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            q, k, v = (one.transpose(0, 1) for one in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k.shape[1])
        k, v = self._extended(k, "bias_k"), self._extended(v, "bias_v")
        q, k, v = (one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.mT
            shares = (scores if mask is None else scores + mask).softmax(-1)
            shares = functional.dropout(shares, dropout) if dropout else shares
            out = shares @ v
            weights = shares.mean(1) if average_attn_weights else shares
        else:
            out = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(-2))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        if self.in_proj is None:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        outputs = {id(x): self.in_proj(x) for x in {id(one): one for one in (query, key, value)}.values()}
        q, k, v = (outputs[id(x)].chunk(3, -1)[part] for part, x in enumerate((query, key, value)))
        return q, k, v

    def _extended(self, x: Tensor, name: str) -> Tensor:
        """Keys or values (batch, n, e), with the positions behind them that every query may attend to."""
        bias = self._parameters[name]
        if bias is not None:
            x = torch.cat([x, bias.expand(len(x), 1, -1)], 1)
        return torch.cat([x, torch.zeros_like(x[:, :1])], 1) if self.add_zero_attn else x

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
        """What is added to the scores (batch, heads, queries, keys): both masks as one, widened like the keys."""
        mask: Tensor | None = None
        if attention is not None:
            mask = _additive(attention, q.dtype)
            mask = mask.reshape(-1, self.num_heads, *mask.shape[-2:]) if mask.ndim == 3 else mask[None, None]
        if padding is not None:
            wide = _additive(padding, q.dtype).reshape(len(q), 1, 1, keys)
            mask = wide if mask is None else mask + wide
        extra = (self.bias_k is not None) + self.add_zero_attn
        return functional.pad(mask, (0, extra)) if mask is not None and extra else mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add; a boolean one is true where nothing may be attended to."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _thirds(packed: Tensor) -> list[nn.Parameter]:
    """The parts of a packed parameter for queries, keys and values, as parameters that are trained where it is."""
    return [nn.Parameter(part, packed.requires_grad) for part in packed.detach().chunk(3)]


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A Linear around a weight and a bias, which it shares."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = weight
    made.register_parameter("bias", bias)
    return made


def is_self_attention(args: tuple[object, ...]) -> bool:
    """Whether an attention was called with one tensor for queries, keys and values."""
    return len(args) > 2 and args[0] is args[1] is args[2]
