"""Patterns of names: which parameters they mean, and what was probably meant instead."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from .naming import Collected, Named

__all__ = ["Pattern", "Patterns", "as_patterns", "assign", "select", "spelt"]

T = TypeVar("T")

Pattern = str | re.Pattern[str]
"""A name, a glob such as "backbone.*", or a compiled regular expression found in the name."""

Patterns = Pattern | Iterable[Pattern]

SHOWN = 3
# difflib takes some 30 microseconds per name
MOST_COMPARED = 5000


def as_patterns(patterns: Any, owner: str) -> list[Pattern]:
    """One pattern or several, as a list.

    Raises:
        TypeError: one is neither a str nor a compiled regular expression
    """
    single = isinstance(patterns, (str, re.Pattern)) or not isinstance(patterns, Iterable)
    found = [patterns] if single else list(patterns)
    for pattern in found:
        written = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
        if not isinstance(written, str):
            raise TypeError(
                f"{owner}: a pattern must be a str, such as 'backbone.*', or a compiled regular "
                f"expression, got {pattern!r}"
            )
    return found


def spelt(pattern: Pattern) -> str:
    """The pattern as it was written."""
    return pattern if isinstance(pattern, str) else pattern.pattern


def select(patterns: Sequence[Pattern], collected: Collected, owner: str) -> list[list[Named]]:
    """The parameters that each pattern means; a tied one is meant by any of its names.

    Raises:
        ValueError: a pattern means none; the message lists the nearest names
    """
    members = collected.members
    found = [[named for named in members if _means(pattern, named)] for pattern in patterns]
    for pattern, some in zip(patterns, found, strict=True):
        if not some:
            raise ValueError(f"{owner}: {_none_found(pattern, collected)}")
    return found


def assign(
    values: Mapping[Pattern, T], collected: Collected, owner: str, remedy: str = ""
) -> dict[int, T]:
    """The value of the one pattern that means a parameter, by the id of the parameter.

    Raises:
        ValueError: a pattern means none, or two mean the same one
    """
    patterns = as_patterns(list(values), owner)
    chosen: dict[int, Pattern] = {}
    for pattern, members in zip(patterns, select(patterns, collected, owner), strict=True):
        twice = [named for named in members if id(named.param) in chosen]
        if twice:
            names = ", ".join(named.spoken for named in twice[:SHOWN])
            more = f" and {len(twice) - SHOWN} more" if len(twice) > SHOWN else ""
            raise ValueError(
                f"{owner}: patterns {spelt(chosen[id(twice[0].param)])!r} and {spelt(pattern)!r} "
                f"both match {names}{more}: make one of them narrower{remedy}"
            )
        chosen |= {id(named.param): pattern for named in members}
    return {key: values[pattern] for key, pattern in chosen.items()}


def _means(pattern: Pattern, named: Named) -> bool:
    if isinstance(pattern, str):
        return any(fnmatch.fnmatchcase(use.name, pattern) for use in named.uses)
    return any(pattern.search(use.name) for use in named.uses)


def _none_found(pattern: Pattern, collected: Collected) -> str:
    frozen = [named for named in collected.frozen if _means(pattern, named)]
    if frozen:
        return (
            f"pattern {spelt(pattern)!r} matches frozen parameters only, such as "
            f"{frozen[0].name}: unfreeze them before, or leave the pattern out"
        )
    return f"pattern {spelt(pattern)!r} matches no parameter; {_nearest(pattern, collected)}"


def _nearest(pattern: Pattern, collected: Collected) -> str:
    names = [use.name for named in collected.members for use in named.uses]
    places = dict.fromkeys(f"{place}.*" for name in names for place in _places(name))
    written = (
        spelt(pattern) if isinstance(pattern, str) else re.sub(r"[\\^$()?+]", "", spelt(pattern))
    )
    close = difflib.get_close_matches(written, [*places, *names][:MOST_COMPARED], n=SHOWN)
    if close:
        return f"the nearest names are {', '.join(map(repr, close))}"
    tops = dict.fromkeys(name.split(".")[0] for name in names)
    return f"names begin with {', '.join(list(tops)[:10])}{', ...' if len(tops) > 10 else ''}"


def _places(name: str) -> list[str]:
    """Every module on the way to a name: a, a.b of a.b.weight."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
