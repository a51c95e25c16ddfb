"""Is all here that any version of torch has, from 2.11 to the newest, whichever is installed?"""

from __future__ import annotations

import importlib
import inspect
from operator import attrgetter
from typing import Any

import pytest

from .differences import ARGUMENTS, row
from .torch_versions import (
    INSTALLED,
    MODULES,
    NEWEST,
    TABLE,
    arguments,
    at,
    signature,
    surface,
    version_of,
)

Kinds = inspect.Parameter
VERSIONS = sorted({version_of(since) for history in TABLE.values() for since in history})


def _ours(path: str) -> Any:
    module, _, name = path.rpartition(".") if path.endswith("__all__") else path.partition(".")
    if module not in MODULES:
        module, name = "", path
    found = importlib.import_module(f"stepwell.{module}".rstrip("."))
    return attrgetter(name)(found)


def _paths() -> list[tuple[str, Any]]:
    """Everything that any of the versions has, as often as it changed."""
    found = {}
    for version in VERSIONS:
        found |= {(path, str(value)): value for path, value in at(version).items()}
    return [(path, value) for (path, _), value in found.items()]


def test_the_versions_are_those_that_the_package_is_for() -> None:
    assert VERSIONS[0] == (2, 11)
    assert NEWEST >= (2, 15)


@pytest.mark.skipif(
    INSTALLED > NEWEST, reason="newer than the table: python -m tests.torch_versions"
)
def test_the_table_is_what_the_installed_torch_has() -> None:
    assert at(INSTALLED) == surface()


@pytest.mark.parametrize(("path", "value"), _paths())
def test_it_is_here(path: str, value: Any) -> None:
    """The same arguments in the same order; more only by keyword, and if a page says so."""
    if path.endswith(".recursive_undo"):
        row("`SequentialLR.recursive_undo`")
        return
    ours = _ours(path)
    if ours is None and path not in at(INSTALLED):
        # a function of torch's own, for classes of either package
        assert path == "swap_in_optimizer_params_and_state"
        return
    if isinstance(value, list):
        assert set(value) <= set(ours)
        return
    if path.endswith("Optimizer"):
        row("signature of `Optimizer`")
        return
    theirs, found = arguments(value), arguments(signature(ours))
    names = {p.name for p in theirs}
    shared = [(p.name, p.kind, p.default) for p in found if p.name in names]
    assert shared == [(p.name, p.kind, p.default) for p in theirs]
    more = [p for p in found if p.name not in names]
    newest = {p.name for p in arguments(at(NEWEST)[path])}
    # the page means those of optimizers
    is_of_schedule = path.endswith(".load_state_dict") and path.startswith(("lr_", "swa_"))
    allowed = set() if is_of_schedule else ARGUMENTS[path.rpartition(".")[2]]
    assert {p.name for p in more} - newest == allowed - newest
    assert all(p.kind is Kinds.KEYWORD_ONLY for p in more)


def test_constants_that_code_imports_from_torchs_modules() -> None:
    for module, name in (
        ("lr_scheduler", "EPOCH_DEPRECATION_WARNING"),
        ("swa_utils", "PARAM_LIST"),
    ):
        ours, theirs = (
            importlib.import_module(f"{p}.{module}") for p in ("stepwell", "torch.optim")
        )
        assert getattr(ours, name) is getattr(theirs, name)
