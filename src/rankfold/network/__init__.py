"""The network as rankfold sees it: its layers, what they cost, and the surgery that turns a plan into a model."""

from rankfold.network.costs import cost_of
from rankfold.network.finding import Layers, find_layers
from rankfold.network.surgery import apply_plan

__all__ = ["Layers", "apply_plan", "cost_of", "find_layers"]
