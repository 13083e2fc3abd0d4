"""rankfold: smaller, ordinary PyTorch models from pre-trained ones, by low-rank and tensor decomposition."""

from rankfold.budget import Budget, Cost
from rankfold.errors import (
    ArtifactError,
    BudgetError,
    DataError,
    ModelError,
    PlanError,
    RankfoldError,
    UnknownNameError,
)
from rankfold.pipeline import Result, compress
from rankfold.plan import LayerPlan, Plan

__all__ = [
    "ArtifactError",
    "Budget",
    "BudgetError",
    "Cost",
    "DataError",
    "LayerPlan",
    "ModelError",
    "Plan",
    "PlanError",
    "RankfoldError",
    "Result",
    "UnknownNameError",
    "compress",
]

__version__ = "0.1.0"
