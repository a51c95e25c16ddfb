"""Names, arguments and defaults of each version of torch, as a table that is kept as data.

A test that runs with one torch can so ask for what a newer one has. For each thing,
torch_versions.json has the versions in which it came or changed.

    python -m tests.torch_versions    adds what the installed torch has
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_suffix(".json")
MODULES = ("", "functional", "lr_scheduler", "optimizer", "swa_utils")

Version = tuple[int, int]


def version_of(text: str) -> Version:
    """2.13.0+cpu -> (2, 13)"""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


INSTALLED = version_of(torch.__version__)


def signature(function: Any) -> str:
    """Names, kinds and defaults, without types: "params, lr=0.001, *, foreach=None"."""
    found = inspect.signature(function)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(inspect.Signature(plain))[1:-1]


def _things(package: str, modules: tuple[str, ...] = MODULES) -> Iterator[tuple[str, Any]]:
    """All public names of a package that is torch.optim or like it, by their path in there."""
    for name in modules:
        try:
            module = importlib.import_module(f"{package}.{name}".rstrip("."))
        except ModuleNotFoundError:
            continue
        listed = getattr(module, "__all__", ())
        yield f"{name}.__all__".lstrip("."), sorted(listed)
        for inner in listed:
            thing = getattr(module, inner)
            path = f"{name}.{inner}".lstrip(".")
            if inspect.isclass(thing):
                yield path, signature(thing)
                for method, function in vars(thing).items():
                    if _is_of(thing, function) and not method.startswith("_"):
                        yield f"{path}.{method}", signature(function)
            elif inspect.isroutine(thing):
                yield path, signature(thing)


def _is_of(owner: type, function: Any) -> bool:
    """Return whether a class itself defines this; torch puts hooks around an inherited step too."""
    inner = inspect.unwrap(function) if inspect.isfunction(function) else None
    return inner is not None and inner.__qualname__.startswith(f"{owner.__name__}.")


def surface() -> dict[str, Any]:
    """Return what the installed torch has, by path: arguments, or the names in a module."""
    return dict(_things("torch.optim"))


TABLE: dict[str, dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else {}
"""By path, what it is since which version; None where a version has dropped it."""

NEWEST = max([version_of(since) for history in TABLE.values() for since in history] or [(0, 0)])


def at(version: Version) -> dict[str, Any]:
    """Return what this version of torch has, by path."""
    found = {}
    for path, history in TABLE.items():
        past = [value for since, value in history.items() if version_of(since) <= version]
        if past and past[-1] is not None:
            found[path] = past[-1]
    return found


def arguments(text: str) -> list[inspect.Parameter]:
    """The parameters of a `signature`."""
    made: dict[str, Any] = {}
    exec(f"def function({text}): pass", {"inf": float("inf")}, made)
    return list(inspect.signature(made["function"]).parameters.values())


def newer(path: str) -> set[str]:
    """The arguments that the newest torch has there, and the installed one has not."""
    known, installed = (arguments(at(v).get(path, "")) for v in (NEWEST, INSTALLED))
    return {p.name for p in known} - {p.name for p in installed}


def _add() -> None:
    """Write what the installed torch has into the table."""
    before, now = at(INSTALLED), surface()
    changed = {path: now.get(path) for path in before.keys() | now.keys()}
    for path, value in changed.items():
        if value != before.get(path):
            TABLE.setdefault(path, {})["{}.{}".format(*INSTALLED)] = value
    FILE.write_text(json.dumps(dict(sorted(TABLE.items())), indent=1) + "\n")


if __name__ == "__main__":
    _add()
