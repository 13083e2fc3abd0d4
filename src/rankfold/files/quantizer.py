"""What transformers loads a compressed model by: a quantisation method called "rankfold", for any architecture.

The configuration holds the plan, by which layers are replaced before weights are loaded. Importing this registers it;
`rankfold` does so once transformers is there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankfold.network.surgery import rebuilt
from rankfold.plan import KNOWN_PLAN, Plan

METHOD = "rankfold"
"""What the configuration calls it."""


def with_stops(state: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """A state with an empty tensor under the name of each weight that factors stand for.

    transformers leaves out methods that it does not know, with a warning, and draws weights at random that a file does
    not hold; where one is of another shape it stops.
    """
    return {**dict.fromkeys(replaced_weights(plan), torch.empty(0)), **state}


def replaced_weights(plan: Plan) -> list[str]:
    """The names of the weights that factors stand for."""
    return [f"{path}.weight" for layer in plan.decomposed for path in (layer.name, *layer.aliases)]


@register_quantization_config(METHOD)
class PlanConfig(QuantizationConfigMixin):
    """A plan as part of a model's configuration, as the text of its JSON, whose checksum shows if it was altered."""

    def __init__(self, plan: str, quant_method: str = METHOD, **others: Any) -> None:
        self.quant_method: Any = quant_method
        self.plan = plan


@register_quantizer(METHOD)
class PlanQuantizer(HfQuantizer):
    """Puts the layers of a plan in place of those that a configuration describes."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **others: Any) -> Any:
        plan = self._plan()
        with torch.device("meta"):
            found: Any = rebuilt(model, plan)
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {f"^{name}$" for name in replaced_weights(plan)}
        return found

    def _process_model_after_weight_loading(self, model: nn.Module, **others: Any) -> nn.Module:  # pyrefly: ignore[bad-override]
        setattr(model, KNOWN_PLAN, self._plan())
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:  # pyrefly: ignore[bad-override]
        """What transformers' own `save_pretrained` writes, with what keeps it from being loaded without rankfold."""
        return with_stops(model.state_dict(), self._plan()), {}

    def _plan(self) -> Plan:
        return Plan.from_json(cast(PlanConfig, self.quantization_config).plan)

    def is_serializable(self, *args: Any, **others: Any) -> bool:  # pyrefly: ignore[bad-override]
        """Whether it can be saved again: it can."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyrefly: ignore[bad-override]
        """Whether it can be trained: factors are parameters like others."""
        return True
