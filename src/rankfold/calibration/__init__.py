"""Calibration: what goes into layers, measured or made; fits in forward order."""

from rankfold.calibration.moments import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
