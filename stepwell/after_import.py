"""after_import: what is registered with a module that few programs import, once one does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import dropwhile
from types import ModuleType
from typing import Any

__all__ = ["after_import"]


def after_import(name: str, ours: str) -> None:
    """Call `register(module)` of the module `ours` each time the module `name` has been executed.

    That is now if it has been imported, and right after it will be imported or reloaded.
    """
    if name in sys.modules:
        import_module(ours).register(sys.modules[name])
    # one that is there already was made before a reload of this package
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if getattr(finder, "waits_for", None) != (name, ours)
    ]
    sys.meta_path.insert(0, _Waiting(name, ours))


class _Waiting(MetaPathFinder):
    """Finds no module by itself, but sees when `name` is looked for.

    It stays: a module that is looked for need not be imported, and can be reloaded.
    """

    def __init__(self, name: str, ours: str) -> None:
        self.waits_for = name, ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None, unless it is `name`: then what the others find, and ours is told after it."""
        name, ours = self.waits_for
        if fullname != name:
            return None
        spec = self._found_by_others(fullname, path, target)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                import_module(ours).register(module)

            loader.exec_module = exec_module
        return spec

    def _found_by_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        # those before this one have found nothing
        for finder in dropwhile(lambda each: each is not self, sys.meta_path):
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None
