"""What is in a file, and what differs between two, as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .reading import File
from .states import checked_optimizer
from .values import unpack

__all__ = ["difference", "groups_table", "heading", "tensors_table"]


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
        f"{printable(description.get('torch'))}"
    )


def groups_table(file: File) -> Table:
    """The groups of the optimizer: how many parameters, and the hyperparameters."""
    table = _table("group", "parameters", "hyperparameters")
    packed = checked_optimizer(file.description["optimizer"])
    for index, group in enumerate(packed["groups"]):
        values = _values(file, group)
        params = values.pop("params", ())
        shown = ", ".join(f"{key}={_short(value)}" for key, value in values.items())
        table.add_row(str(index), str(len(params)), Text(printable(shown)))
    return table


def tensors_table(file: File) -> Table:
    """All tensors by their names, with their norms and sizes, and the steps of each parameter."""
    table = _table("tensor", "shape", "dtype", "norm", "bytes", "steps")
    steps = _steps(file)
    for name in sorted(file.header.entries):
        tensor = file.tensor(name)
        table.add_row(
            Text(printable(name)),
            _shape(tensor),
            _dtype(tensor),
            f"{_norm(tensor):.4g}",
            f"{tensor.nbytes:,}",
            steps.get(name.removeprefix("optimizer.").rpartition(".")[0], ""),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        to_the_right = column in ("norm", "bytes", "steps", "parameters", "largest", "differ")
        table.add_column(column, justify="right" if to_the_right else "left", overflow="fold")
    return table


def printable(text: Any) -> str:
    """Text that does nothing to a terminal but stand there."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text)
    )


def _values(file: File, packed: Any) -> dict[str, Any]:
    values = unpack(packed, lambda name, _: file.tensor(name))
    return values if isinstance(values, dict) else {}


def _short(value: Any) -> str:
    return f"{value.item():g}" if isinstance(value, Tensor) and value.numel() == 1 else str(value)


def _steps(file: File) -> dict[str, str]:
    """How many steps each parameter has taken."""
    if "optimizer" not in file.description:
        return {}
    found = {}
    for name, entry in checked_optimizer(file.description["optimizer"])["state"].items():
        # only numbers are asked for, tensors are not read
        step = unpack(entry, lambda *_: torch.empty(0))
        if isinstance(step, dict) and "step" in step:
            found[name] = _short(step["step"])
    return found


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _norm(tensor: Tensor) -> float:
    wide = tensor.double() if tensor.is_floating_point() else tensor.to(torch.float64)
    return float(torch.linalg.vector_norm(wide))


class Change(NamedTuple):
    """One thing that differs."""

    name: str
    what: str
    largest: str = ""
    differ: str = ""


def difference(one: File, other: File) -> Table | None:
    """What differs between two files, or None: tensors, hyperparameters, everything else."""
    changes = [*_tensor_changes(one, other), *_value_changes(one, other)]
    if not changes:
        return None
    table = _table("what", "change", "largest", "differ")
    for change in changes:
        table.add_row(*(Text(printable(text)) for text in change))
    return table


def _tensor_changes(one: File, other: File) -> list[Change]:
    changes = []
    for name in sorted(one.header.entries.keys() | other.header.entries.keys()):
        if name not in other.header.entries:
            changes.append(Change(name, "only in the first"))
        elif name not in one.header.entries:
            changes.append(Change(name, "only in the second"))
        else:
            changes += _compared(name, one.tensor(name), other.tensor(name))
    return changes


def _compared(name: str, a: Tensor, b: Tensor) -> list[Change]:
    if a.shape != b.shape or a.dtype != b.dtype:
        kinds = [f"{_dtype(tensor)} {_shape(tensor)}" for tensor in (a, b)]
        return [Change(name, " -> ".join(kinds))]
    wide, others = a.double(), b.double()
    differs = (wide != others) & ~(wide.isnan() & others.isnan())
    if not differs.any():
        return []
    largest = float((wide - others)[differs].abs().max())
    count = f"{int(differs.sum()):,} of {a.numel():,}"
    return [Change(name, "values", f"{largest:.4g}", count)]


def _value_changes(one: File, other: File) -> list[Change]:
    flat, others = (_flat(_without_digests(file.description), "") for file in (one, other))
    names = dict.fromkeys([*flat, *others])
    return [
        Change(name, f"{flat.get(name, 'nothing')} -> {others.get(name, 'nothing')}")
        for name in names
        if flat.get(name) != others.get(name)
    ]


def _without_digests(description: Mapping[str, Any]) -> dict[str, Any]:
    # a tensor whose digest differs is compared itself
    return {key: value for key, value in description.items() if key != "digests"}


def _flat(value: Any, name: str) -> dict[str, str]:
    """The plain values in JSON, by where they stand."""
    if isinstance(value, dict):
        if set(value) == {"dict"} and isinstance(value["dict"], list):
            # pairs of keys and values
            pairs = [pair for pair in value["dict"] if isinstance(pair, list) and len(pair) == 2]
            return _flat({str(key): item for key, item in pairs}, name)
        items: Any = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)
    else:
        return {name: str(value)}
    found: dict[str, str] = {}
    for key, item in items:
        found |= _flat(item, f"{name}.{key}" if name else str(key))
    return found
