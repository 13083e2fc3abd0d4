"""Objectives of `rankfold.search.Rene` that go through the whole network."""

from rankfold.search.network_objectives import Divergence, NetworkObjective, Validation

__all__ = ["Divergence", "NetworkObjective", "Validation"]
