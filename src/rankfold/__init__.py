"""rankfold: smaller, ordinary PyTorch models from pre-trained ones, by low-rank and tensor decomposition."""

from rankfold.budget import Budget, Cost
from rankfold.errors import (
    ArtifactError,
    BudgetError,
    DataError,
    ModelError,
    PlanError,
    RankfoldError,
    SearchError,
    TrainingError,
    UnknownNameError,
)
from rankfold.files.artifact import load, load_plan, plan_of, save
from rankfold.files.by_blocks import compress_files
from rankfold.files.on_import import register_with_transformers
from rankfold.files.pretrained import save_pretrained
from rankfold.pipeline import Result, Study, compress, study
from rankfold.plan import LayerPlan, Plan
from rankfold.reports.analysis import Analysis, analyze

__all__ = [
    "Analysis",
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
    "SearchError",
    "Study",
    "TrainingError",
    "UnknownNameError",
    "analyze",
    "compress",
    "compress_files",
    "load",
    "load_plan",
    "plan_of",
    "save",
    "save_pretrained",
    "study",
]

__version__ = "0.1.0"

register_with_transformers()
