"""What is in a file, as tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .header import Entry
from .reading import File
from .states import checked_optimizer
from .values import unpack

__all__ = [
    "dtype_of",
    "groups_table",
    "heading",
    "params_table",
    "printable",
    "shape_of",
    "table",
    "tensors_table",
    "values_table",
]

ROWS, LONGEST = 50, 200
"""Largest number of values that are listed, and of characters in each."""

LONG = ("change", "hyperparameters", "parameter", "tensor", "value", "what")
"""Columns of long texts."""

NUMBERS = ("bytes", "differ", "group", "largest", "norm", "parameters", "steps")
"""Columns that are aligned at their right."""


def heading(file: File) -> str:
    """What the file holds, in a line."""
    description = file.description
    parts: list[str] = [
        key for key in ("model", "averaged", "scheduler", "random") if key in description
    ]
    if "optimizer" in description:
        rule = checked_optimizer(description["optimizer"])["rule"]
        parts.insert(0, f"{printable(rule or 'an optimizer')}")
    if "extra" in description:
        parts.append("extra")
    sizes = [entry.stop - entry.start for entry in file.header.entries.values()]
    return (
        f"{', '.join(parts) or 'nothing'}; {len(sizes)} tensors, {sum(sizes):,} bytes; written by "
        f"stepwell {printable(description.get('stepwell'))} with torch "
        f"{printable(description.get('torch'))}{_when(description.get('saved'))}"
    )


def _when(saved: Any) -> str:
    # up to the year 2116, for files that were not written by us
    if type(saved) is not int or not 0 < saved < 1 << 62:
        return ""
    return f"{datetime.fromtimestamp(saved // 10**9, timezone.utc): at %Y-%m-%d %H:%M:%S UTC}"


def groups_table(file: File) -> Table:
    """The groups of the optimizer: how many parameters, and the hyperparameters."""
    found = table("group", "parameters", "hyperparameters")
    for index, group in enumerate(checked_optimizer(file.description["optimizer"])["groups"]):
        values = _values(file, group)
        params = values.pop("params", ())
        shown = ", ".join(f"{key}={_short(value)}" for key, value in values.items())
        found.add_row(str(index), f"{len(params):,}", Text(printable(shown)))
    return found


def values_table(file: File) -> Table | None:
    """Return the state of the schedule and the saved `extra`; None if there is neither."""
    found = table("what", "value")
    rows = [*_schedule_rows(file), *_rows(_unpacked(file, "extra"), "extra")]
    for what, value in shown_rows(rows):
        found.add_row(Text(printable(what)), Text(printable(value)))
    return found if rows else None


def shown_rows(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """As many of them as a user reads."""
    rest = len(rows) - ROWS
    return [*rows[:ROWS], ("...", f"{rest:,} more")] if rest > 0 else rows


def _schedule_rows(file: File) -> Iterator[tuple[str, str]]:
    state = _unpacked(file, "scheduler")
    if not isinstance(state, dict):
        return
    if kind := file.description.get("scheduler_class"):
        yield "scheduler", str(kind)
    for key, name in (("last_epoch", "step"), ("_last_lr", "rates")):
        if key in state:
            yield f"scheduler: {name}", _short(state[key])


def _rows(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """The items of dicts and lists, each in a row; short lists of plain values stay whole."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _rows(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)) and any(
        isinstance(item, (dict, list, tuple, Tensor)) for item in value
    ):
        for index, item in enumerate(value):
            yield from _rows(item, f"{name}.{index}")
    elif value is not None or name != "extra":
        text = _short(value)
        yield name, text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _unpacked(file: File, key: str) -> Any:
    # the tensors have a table of their own
    return unpack(file.description.get(key), lambda name, _: file.like(name))


def params_table(file: File) -> Table:
    """The parameters of the optimizer, in the order of their groups: those without state too."""
    found = table("parameter", "group", "shape", "dtype", "steps")
    packed = checked_optimizer(file.description["optimizer"])
    for index, group in enumerate(packed["groups"]):
        for name in map(str, _values(file, group).get("params", ())):
            shape, dtype = _recorded(packed["params"].get(name))
            cells = (name, index, shape, dtype, _steps(packed["state"].get(name)))
            found.add_row(*(Text(printable(cell)) for cell in cells))
    return found


def _recorded(kind: Any) -> tuple[str, str]:
    """The shape and dtype that were saved of a parameter; files of torch do not have them."""
    if not isinstance(kind, list) or len(kind) != 2 or not isinstance(kind[0], list):
        return "", ""
    return str(tuple(kind[0])), str(kind[1])


def _steps(entry: Any) -> str:
    """How many steps a parameter has taken, if its state says so."""
    if entry is None:
        return "no state"
    # only numbers are asked for, tensors are not read
    state = unpack(entry, lambda *_: torch.empty(0, device="cpu"))
    return _short(state["step"]) if isinstance(state, dict) and "step" in state else ""


def tensors_table(file: File) -> Table:
    """All tensors by their names, with their norms and sizes."""
    found = table("tensor", "shape", "dtype", "norm", "bytes")
    for name in sorted(file.header.entries):
        tensor = file.tensor(name)
        found.add_row(
            Text(printable(name)),
            shape_of(tensor),
            dtype_of(tensor),
            f"{_norm(tensor):.4g}",
            f"{tensor.nbytes:,}",
        )
    return found


def table(*columns: str) -> Table:
    """An empty table; on narrow terminals its long texts are folded, and nothing else."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        found.add_column(
            column,
            justify="right" if column in NUMBERS else "left",
            overflow="fold",
            no_wrap=column not in LONG,
            min_width=16 if column in LONG else None,
        )
    return found


def printable(text: Any) -> str:
    """Text that does nothing to a terminal but stand there."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text)
    )


def _values(file: File, packed: Any) -> dict[str, Any]:
    values = unpack(packed, lambda name, _: file.tensor(name))
    return values if isinstance(values, dict) else {}


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_meta:
            return f"{value.item():g}"
        return f"{dtype_of(value)} {shape_of(value)}"
    if isinstance(value, (list, tuple)):
        kind = "({})" if isinstance(value, tuple) else "[{}]"
        return kind.format(", ".join(map(_short, value)))
    return str(value)


def shape_of(tensor: Tensor | Entry) -> str:
    return str(tuple(tensor.shape))


def dtype_of(tensor: Tensor | Entry) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _norm(tensor: Tensor) -> float:
    wide = tensor.double() if tensor.is_floating_point() else tensor.to(torch.float64)
    return float(torch.linalg.vector_norm(wide))
