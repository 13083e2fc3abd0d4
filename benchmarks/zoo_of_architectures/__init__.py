"""Small networks of many architectures, each with example inputs: real libraries' classes, weights at random."""

from zoo_of_architectures.entry import Architecture
from zoo_of_architectures.images import CLASSIFIERS
from zoo_of_architectures.scenes import SCENES
from zoo_of_architectures.sequences import SEQUENCES

ARCHITECTURES: dict[str, Architecture] = {one.name: one for one in (*CLASSIFIERS, *SCENES, *SEQUENCES)}
"""Every architecture by name."""

__all__ = ["ARCHITECTURES", "Architecture"]
