"""Packages that only an extra of the project brings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ExtraMissingError(ImportError):
    """A package is not installed; the message names the extra that brings it."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Imports in this block belong to an extra: say which, where they fail.

    Raises:
        ExtraMissingError: a package is not installed
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ExtraMissingError(
            f"{error.name} is not installed: pip install 'stepwell[{extra}]'", name=error.name
        ) from error
