"""Compose the error for a file that does not fit a training; each tensor is listed once."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..matching import LoadReport, shown
from .header import CheckpointError

__all__ = ["refusal"]

LINES = 100
"""Largest number of misfits of each kind that an error lists; its `report` has all."""

MODULE = re.compile(r"(model|averaged): (\S+)")
PARAM = re.compile(r"(?!(?:scheduler|optimizer): )(\S+?)(?::? |$)")
OTHER = re.compile(r" \(the \w+(?: \w+)? has (\S+)\)$")


def refusal(report: LoadReport) -> CheckpointError:
    """The error that says what does not fit."""
    lines = list(_lines(report))
    rest = sum(map(len, report)) - len(lines)
    whole = "; each tensor is listed once, the error's report has all" if rest else ""
    listed = "".join(
        f"\n  {line}"
        for kind in report._fields
        for line in shown([line for line in lines if line.startswith(f"{kind}: ")], LINES)
    )
    error = CheckpointError(
        f"does not fit:{listed}\n  (nothing was loaded; strict=False loads "
        f"what fits, and rename={{...}} changes saved names{whole})"
    )
    error.report = report
    return error


def _lines(report: LoadReport) -> Iterator[str]:
    """The entries, without those of an optimizer that say of a tensor what the model's say.

    Nor are names repeated as unexpected that another line says were probably meant.
    """
    for kind, entries in zip(report._fields, report, strict=True):
        others = {name for entry in report.missing for name in OTHER.findall(entry)}
        known = {match[2] for match in map(MODULE.match, entries) if match and match[1] == "model"}
        for entry in entries:
            match = MODULE.match(entry)
            name = match[2] if match else _param(entry)
            if name is not None and match is None and name in known:
                continue
            if match is None and name is not None:
                known.add(name)
            if kind == "unexpected" and name in others:
                continue
            yield f"{kind}: {entry}"


def _param(entry: str) -> str | None:
    match = PARAM.match(entry)
    return None if match is None or match[1] in ("group", "the") else match[1]
