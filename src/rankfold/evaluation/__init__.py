"""What a model is worth, beside its original: accuracy, perplexity, agreement on pairs of sentences, and time."""

from rankfold.evaluation.language import Perplexity, Speed, perplexity, speeds
from rankfold.evaluation.scores import BATCH, VALUES, Accuracy, accuracy
from rankfold.evaluation.similarity import Similarity, similarity
from rankfold.network.timing.turns import in_turns, latency

__all__ = [
    "BATCH",
    "VALUES",
    "Accuracy",
    "Perplexity",
    "Similarity",
    "Speed",
    "accuracy",
    "in_turns",
    "latency",
    "perplexity",
    "similarity",
    "speeds",
]
