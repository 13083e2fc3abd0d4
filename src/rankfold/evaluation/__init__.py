"""What a model is worth, beside its original: accuracy, perplexity, and time."""

from rankfold.evaluation.language import Perplexity, Speed, perplexity, speeds
from rankfold.evaluation.scores import BATCH, VALUES, Accuracy, accuracy
from rankfold.network.timing.turns import in_turns, latency

__all__ = [
    "BATCH",
    "VALUES",
    "Accuracy",
    "Perplexity",
    "Speed",
    "accuracy",
    "in_turns",
    "latency",
    "perplexity",
    "speeds",
]
