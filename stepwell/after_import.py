"""after_import: what is registered with a module that few programs import, once one does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["after_import"]


def after_import(name: str, ours: str) -> None:
    """Call `register(module)` of the module `ours` as soon as the module `name` is imported.

    That is now if it has been imported, and else right after it will be.
    """
    if name in sys.modules:
        import_module(ours).register(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waiting(name, ours))


class _Waiting(MetaPathFinder):
    """Finds no module, but sees when `name` is looked for."""

    def __init__(self, name: str, ours: str) -> None:
        self._name = name
        self._ours = ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None, unless it is `name`: then what the others find, and ours is told after it."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                import_module(self._ours).register(module)

            loader.exec_module = exec_module
        return spec
