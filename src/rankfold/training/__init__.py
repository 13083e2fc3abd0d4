"""Fine-tuning a compressed network, taught by its original."""

from rankfold.training.augment import AUGMENTATIONS
from rankfold.training.distillation import Losses
from rankfold.training.examples import Unlabelled, split
from rankfold.training.geometry import Geometry
from rankfold.training.history import Epoch, Trained
from rankfold.training.loop import fine_tune
from rankfold.training.settings import Training

__all__ = ["AUGMENTATIONS", "Epoch", "Geometry", "Losses", "Trained", "Training", "Unlabelled", "fine_tune", "split"]
