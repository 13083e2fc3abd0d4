"""Fine-tuning a compressed network, taught by its original."""

from rankfold.training.augment import AUGMENTATIONS
from rankfold.training.damping import DAMPING, damp_
from rankfold.training.distillation import Losses
from rankfold.training.loop import Epoch, Trained, fine_tune, split
from rankfold.training.settings import Training

__all__ = ["AUGMENTATIONS", "DAMPING", "Epoch", "Losses", "Trained", "Training", "damp_", "fine_tune", "split"]
