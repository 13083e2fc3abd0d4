"""What transformers loads a compressed model by: a quantisation method called "rankfold", for any architecture.

The configuration holds the plan, by which layers are replaced before weights are loaded. Importing this registers it;
`rankfold` does so once transformers is there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankfold.network.surgery import rebuilt
from rankfold.plan import KNOWN_PLAN, Plan

METHOD = "rankfold"
"""What the configuration calls it."""


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
        replaced = {f"{path}.weight" for layer in plan.decomposed for path in (layer.name, *layer.aliases)}
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {f"^{name}$" for name in replaced}
        return found

    def _process_model_after_weight_loading(self, model: nn.Module, **others: Any) -> nn.Module:
        setattr(model, KNOWN_PLAN, self._plan())
        return model

    def _plan(self) -> Plan:
        return Plan.from_json(cast(PlanConfig, self.quantization_config).plan)

    def is_serializable(self, *args: Any, **others: Any) -> bool:
        """Whether it can be saved again: it can."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained: factors are parameters like others."""
        return True
