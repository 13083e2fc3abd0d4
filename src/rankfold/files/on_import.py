"""Registers the quantisation method "rankfold" with transformers once that is imported, and not before."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

REGISTRY = "transformers.quantizers.auto"
"""The module that holds what is registered."""


def register_with_transformers() -> None:
    """Registers the method now where transformers has been imported, otherwise as soon as it is."""
    if REGISTRY in sys.modules:
        importlib.import_module("rankfold.files.quantizer")
    elif not any(isinstance(one, _Watcher) for one in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(MetaPathFinder):
    """Finds the registry as others do, and has it followed by the method's own module."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader)
        return spec


class _Followed(Loader):
    """A loader whose module, once loaded, is followed by the method's."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        cast(ModuleSpec, module.__spec__).loader = self._loader
        importlib.import_module("rankfold.files.quantizer")
