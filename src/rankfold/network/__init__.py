"""The network as rankfold sees it: its layers, what they cost, and the surgery that turns a plan into a model."""

from rankfold.network.surgery import Layers, apply_plan, cost_of, find_layers

__all__ = ["Layers", "apply_plan", "cost_of", "find_layers"]
