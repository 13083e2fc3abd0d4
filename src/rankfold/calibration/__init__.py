"""Calibration: what goes into layers, measured or made; fits in forward order."""

from rankfold.calibration.moments import Calibration, calibrate
from rankfold.calibration.refining import Refining

__all__ = ["Calibration", "Refining", "calibrate"]
