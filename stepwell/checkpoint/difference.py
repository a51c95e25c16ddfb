"""What differs between two files, to the bit, as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .reading import File
from .show import dtype_of, printable, shape_of, table
from .states import checked_optimizer
from .values import unpack

__all__ = ["difference"]

PARTS = ("model", "averaged", "scheduler", "extra", "random")


class Change(NamedTuple):
    """One thing that differs."""

    name: str
    what: str
    largest: str = ""
    differ: str = ""


def difference(one: File, other: File) -> Table | None:
    """What differs between two files, or None: tensors, hyperparameters, everything else.

    When they were saved does not count.
    """
    changes = [*_tensor_changes(one, other), *_value_changes(one, other)]
    if not changes:
        return None
    found = table("what", "change", "largest", "differ")
    for change in changes:
        found.add_row(*(Text(printable(text)) for text in change))
    return found


# Tensors


def _tensor_changes(one: File, other: File) -> list[Change]:
    first, second = one.header.entries, other.header.entries
    changes, same = [], []
    for name in sorted(first.keys() | second.keys()):
        if name not in second:
            changes.append(Change(name, "only in the first"))
        elif name not in first:
            changes.append(Change(name, "only in the second"))
        elif first[name][:2] != second[name][:2]:
            changes.append(Change(name, f"{_kind(first[name])} -> {_kind(second[name])}"))
        elif _digest(one, name) != _digest(other, name):
            changes.append(_compared(name, one.tensor(name), other.tensor(name)))
        else:
            same.append(name)
    # digests say what was written, not what is there
    one.check(same)
    other.check(same)
    return changes


def _kind(entry: Any) -> str:
    return f"{dtype_of(entry)} {shape_of(entry)}"


def _digest(file: File, name: str) -> Any:
    return file.description["digests"][name]


def _compared(name: str, a: Tensor, b: Tensor) -> Change:
    """How far two tensors are apart that are not the same bits."""
    differs = (_bytes(a) != _bytes(b)).any(1)
    largest = _largest(a, b)
    count = f"{int(differs.sum()):,} of {a.numel():,}"
    return Change(name, "values" if largest else "signs of zeros", f"{largest:.4g}", count)


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of each element, (elements, bytes)."""
    return tensor.reshape(-1).view(torch.uint8).view(-1, tensor.element_size())


def _largest(a: Tensor, b: Tensor) -> float:
    """The largest distance of two elements; NaN if one of them is none."""
    if a.is_floating_point():
        # infinities that are equal are not apart
        apart = torch.where(a.double() == b.double(), 0.0, a.double() - b.double())
        return float(apart.abs().max())
    # a double has 53 bits, and the difference of two numbers of 64 may need 65 with its sign
    x, y = a.numpy(), b.numpy()
    wide = [extreme(x, y).astype(np.uint64) for extreme in (np.maximum, np.minimum)]
    return int((wide[0] - wide[1]).max())


# Everything else


@dataclass(frozen=True)
class _Stored:
    """Stands for a tensor, which is compared by itself."""

    name: str
    is_complex: bool


def _stored(name: str, is_complex: bool) -> Any:
    return _Stored(name, is_complex)


class _Nothing:
    """Stands where there is nothing."""


def _value_changes(one: File, other: File) -> list[Change]:
    (a, states), (b, others) = _values(one), _values(other)
    alone = one.header.entries.keys() ^ other.header.entries.keys()
    return [*_changes(a, b, "", alone), *_state_changes(states, others, alone)]


def _values(file: File) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file says besides the tensors, and the state of each parameter."""
    values = {
        key: unpack(value, _stored) if key in PARTS else value
        for key, value in file.description.items()
        if key not in ("digests", "saved")
    }
    if "optimizer" not in values:
        return values, {}
    packed = checked_optimizer(values["optimizer"])
    groups = [unpack(group, _stored) for group in packed["groups"]]
    others = unpack(packed.get("others", {"dict": []}), _stored)
    states = {name: unpack(entry, _stored) for name, entry in packed["state"].items()}
    values["optimizer"] = {**packed, "groups": groups, "others": others, "state": {}}
    return values, states


def _changes(a: Any, b: Any, name: str, alone: Set[str]) -> list[Change]:
    """What differs between two values; of the tensors that are `alone`, it is said already."""
    items, others = _items(a, b), _items(b, a)
    if items or others:
        return [
            change
            for key in {**items, **others}
            for change in _changes(
                items.get(key, _Nothing),
                others.get(key, _Nothing),
                f"{name}.{key}" if name else key,
                alone,
            )
        ]
    is_said = _is_alone(a, b, alone) or _is_alone(b, a, alone)
    if is_said or _text(a) == _text(b):
        return []
    return [Change(name, f"{_text(a)} -> {_text(b)}")]


def _is_alone(value: Any, other: Any, alone: Set[str]) -> bool:
    return isinstance(value, _Stored) and value.name in alone and other is _Nothing


def _items(value: Any, other: Any) -> dict[str, Any]:
    """What a dict, list or tuple consists of, if the other one is of its kind, or nothing."""
    if type(value) is type(other) or other is _Nothing:
        if isinstance(value, dict):
            return {_label(key): item for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return {str(index): item for index, item in enumerate(value)}
    return {}


def _label(key: Any) -> str:
    """The key of a dict, such that no two look alike."""
    is_plain = isinstance(key, str) and "." not in key and key[:1] != "["
    return key if is_plain else f"[{_text(key)}]"


def _text(value: Any) -> str:
    """A value, written so that equal texts are equal values."""
    if value is _Nothing:
        return "nothing"
    if isinstance(value, _Stored):
        return f"the tensor {value.name}"
    if isinstance(value, Tensor):
        return f"{value.item()!r} ({dtype_of(value)})"
    return repr(value)


def _state_changes(
    states: Mapping[str, Any], others: Mapping[str, Any], alone: Any
) -> list[Change]:
    """What differs in the state of parameters; what differs alike is said once."""
    found: dict[tuple[str, str], list[str]] = {}
    names = {**states, **others}
    for name in names:
        values = states.get(name, _Nothing), others.get(name, _Nothing)
        for change in _changes(*values, "", alone):
            found.setdefault((change.name, change.what), []).append(name)
    return [
        Change(f"optimizer.state.{changed[0]}.{key}", what)
        if len(changed) == 1
        else Change(f"optimizer.state.*.{key}", what, "", f"{len(changed):,} of {len(names):,}")
        for (key, what), changed in found.items()
    ]
