"""Fine-tuning a compressed network, taught by its original."""

from rankfold.training.augment import AUGMENTATIONS
from rankfold.training.distillation import Losses
from rankfold.training.examples import split
from rankfold.training.geometry import Geometry
from rankfold.training.loop import Epoch, Trained, fine_tune
from rankfold.training.settings import Training

__all__ = ["AUGMENTATIONS", "Epoch", "Geometry", "Losses", "Trained", "Training", "fine_tune", "split"]
