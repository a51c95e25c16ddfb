"""The table of intended differences, docs/differences.md, as the tests read it.

A test that lets a difference pass names the row that allows it. Rows that begin with "argument",
"arguments", "state" or "type of state" are read: what they list must differ, and nothing else may.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[1] / "docs" / "differences.md"


class Row(NamedTuple):
    """A line of the table."""

    where: str
    torch: str
    stepwell: str
    why: str


def _read() -> dict[str, Row]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    # a bar inside a cell is written \|
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[1:]]
    rows = [Row(*row) for row in cells]
    assert len({row.where for row in rows}) == len(rows), "two rows begin with the same words"
    return {row.where: row for row in rows}


ROWS = _read()


def row(where: str) -> Row:
    """The row that begins with these words; without one, a difference is a mistake."""
    assert where in ROWS, f"docs/differences.md has no row {where!r}"
    return ROWS[where]


def _names(kind: str) -> dict[str, set[str]]:
    """The names that rows such as "arguments `a`, `b` of `Muon`, `SGD`" list, by owner."""
    found: dict[str, set[str]] = defaultdict(set)
    for where in ROWS:
        parts = re.fullmatch(rf"{kind} (.+) of (.+)", where)
        if parts:
            names, owners = (re.findall(r"`(\w+)`", part) for part in parts.groups())
            for owner in owners:
                found[owner] |= set(names)
    return found


ARGUMENTS = _names("arguments?")
"""Keyword arguments that torch's class or method of this name does not have."""

STATE = _names("state")
"""Entries of the state that either torch's class or ours does not have."""

TYPES = _names("type of state")
"""Entries of the state that are tensors on one side and plain numbers on the other."""
