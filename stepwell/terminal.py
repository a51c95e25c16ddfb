"""Print to terminals and files whose encoding lacks some characters."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["encodable", "printable"]

PLAIN = str.maketrans({"×": "x", "µ": "u", "·": "-", "–": "-", "…": "...", "─": "-", "━": "-"})
NAME = "stepwell-plain"


@contextmanager
def printable() -> Iterator[None]:
    """Inside, standard output takes any text: what its encoding lacks is spelt in plain letters."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper) or stream.errors != "strict":
        yield
        return
    codecs.register_error(NAME, _plain)
    stream.reconfigure(errors=NAME)
    try:
        yield
    finally:
        stream.reconfigure(errors="strict")


def encodable(text: str) -> str:
    """The text as standard output can take it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        pass
    return text


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return lacking.translate(PLAIN).encode("ascii", "replace").decode(), error.end
