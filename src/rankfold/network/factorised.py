"""What stands in for a decomposed layer: an `nn.Sequential` of its stages that answers as the layer did.

Models, frameworks and tools read attributes of layers: T5 asks for `wo.weight.dtype`, PyTorch's encoder looks at
`linear1.weight` once a padding mask comes, and what fuses batch norms wants `kernel_size` and `weight`. Which of them a
model reads depends on its inputs and on who uses it later, so a run on example inputs cannot tell; hence every stand-in
answers. Its state is that of the plain `nn.Sequential`, which `as_plain` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.decompositions import Factors, reconstruct
from rankfold.decompositions.wiring import LayerShape, Wiring
from rankfold.network.layouts import as_factors
from rankfold.network.stand_ins.stack import FactorBlocks, Stacked


@dataclass(frozen=True)
class Role:
    """What a stand-in stands for: the layer's shape, the factors' wiring and ranks, and the weight as it was kept.

    `places` are the positions of the stages that hold the factors, in the wiring's order; `turned` says that the
    weight has inputs before outputs.
    """

    shape: LayerShape
    wiring: Wiring
    ranks: tuple[int, ...]
    weight: tuple[int, ...]
    turned: bool
    places: tuple[int, ...]


class Factorised(nn.Sequential):
    """The stages in place of a layer; attributes that the layer had it has as well."""

    role: Role
    __jit_unused_properties__ = ["bias", "factors", "weight", "weights"]  # noqa: RUF012

    @property
    def weights(self) -> list[nn.Parameter]:
        """The weights of the stages, in the order of the wiring."""
        stages = list(self.children())
        return [cast(nn.Parameter, stages[place].weight) for place in self.role.places]

    @property
    def factors(self) -> Factors:
        """The factors; differentiable in the stages' weights."""
        return as_factors(self.weights, self.role.shape, self.role.wiring, self.role.ranks)

    @property
    def weight(self) -> Tensor:
        """The weight that the factors stand for, composed anew, as the layer kept it; differentiable."""
        role = self.role
        composed = reconstruct(role.wiring, self.factors)
        return (composed.transpose(1, 2) if role.turned else composed).reshape(role.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias that the layer had, which is that of the last stage."""
        return cast("Tensor | None", getattr(list(self.children())[-1], "bias", None))


class FactorisedStack(Factorised, Stacked):
    """The factors of a stack of matrices: a row of inputs meets those of one matrix."""

    def __getitem__(self, index: Any) -> Any:  # pyrefly: ignore[bad-override-param-name]
        return Stacked.__getitem__(self, index)

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor that the factors stand for."""
        return torch.Size(self.role.weight)

    @property
    def by_rows(self) -> bool:  # pyrefly: ignore[bad-override-mutable-attribute]
        """Whether the matrices stood as (outputs, inputs)."""
        return not self.role.turned

    @by_rows.setter
    def by_rows(self, value: bool) -> None:
        if value != self.by_rows:
            raise TypeError("the matrices of a stack are multiplied both as they are and transposed")

    def forward(self, x: Tensor, index: Any) -> Tensor:  # pyrefly: ignore[bad-override]
        """x (…, inputs) times one matrix, factor by factor."""
        for stage in self.children():
            x = stage(x, index)
        return x


class TransposedLinear(nn.Module):
    """x W, with `weight` as (in_features, out_features): the second factor of an embedding.

    A head that is tied to the embedding uses the same two factors in the other order, and needs this one so.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.in_features, self.out_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in_features) times the weight."""
        return functional.linear(x, self.weight.mT)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def stand_in(module: nn.Module, stages: Sequence[nn.Module], role: Role) -> Factorised:
    """The stages in place of `module`, with its attributes, its hooks and its mode."""
    stacked = isinstance(stages[0], FactorBlocks)
    made = (FactorisedStack if stacked else Factorised)(*stages)
    made.role = role
    carry_over_(module, made)
    return made


def carry_over_(module: nn.Module, successor: nn.Module) -> None:
    """Gives a module's successor its plain attributes, its hooks and its mode."""
    for name, value in vars(module).items():
        if not name.startswith("_") and isinstance(value, (int, float, str, tuple, type(None))):
            if name not in vars(successor) and not hasattr(type(successor), name):
                setattr(successor, name, value)
        elif name in _HOOKS and not getattr(successor, name):
            kept = {key: hook for key, hook in value.items() if not _computes_weight(hook)}
            getattr(successor, name).update(kept)
    successor.train(module.training)


def _computes_weight(hook: object) -> bool:
    """Whether a hook is one of PyTorch's own that make a weight before every call."""
    return type(hook).__module__.startswith("torch.nn.utils.")


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""The dictionaries that a module keeps its hooks in."""


def as_plain(model: nn.Module) -> nn.Module:
    """The model with every stand-in that can be as a plain `nn.Sequential` of its stages, in place; returns the root.

    Nothing of this package is left in it but the stand-ins of packed layers. What reads a layer's attributes fails
    on it.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Factorised:
                setattr(parent, name, nn.Sequential(*child.children()).train(child.training))
    return nn.Sequential(*model.children()).train(model.training) if type(model) is Factorised else model
