"""Reading and writing one hyperparameter of all groups: "lr", "momentum", or one beta, "betas[0]".

Groups of stepwell's optimizers check what is written to them. Here all values are checked together
first, and then written, so that a refusal leaves every group as it was.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..language.fields import near_miss

Groups = Sequence[dict[str, Any]]
Number = float | Tensor


@lru_cache
def _split(name: str) -> tuple[str, int | None]:
    """ "betas[0]" -> ("betas", 0); a plain name has no index."""
    match = re.fullmatch(r"(\w+)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


def read(groups: Groups, name: str) -> list[Any]:
    """The values that the groups hold now; Tensors are those of the groups, no copies."""
    key, index = _split(name)
    if index is None:
        return [group[key] for group in groups]
    return [group[key][index] for group in groups]


def write(groups: Groups, values: Mapping[str, Sequence[Number]]) -> None:
    """Give each group its value of each hyperparameter; a Tensor is filled in place.

    Raises:
        ValueError, TypeError: a value is out of range; nothing is changed
    """
    ready = [_prepared(groups, name, given) for name, given in values.items()]
    for key, whole, setitem in ready:
        for group, value in zip(groups, whole, strict=True):
            setitem(group, key, value)


def _prepared(groups: Groups, name: str, values: Sequence[Number]) -> tuple[str, Any, Any]:
    """The key, what to write under it, and how: checked together, or one by one in writing."""
    key, index = _split(name)
    held = read(groups, name)
    if holds_tensors(held):
        return key, values, _Filler(index)
    whole: Sequence[Any] = values
    if index is not None:
        whole = [
            (*group[key][:index], value, *group[key][index + 1 :])
            for group, value in zip(groups, values, strict=True)
        ]
    kinds = set(map(type, groups))
    check = getattr(kinds.pop(), "check_all", None) if len(kinds) == 1 else None
    if check is None:
        return key, whole, operator.setitem
    return key, check(groups, key, whole), dict.__setitem__


class _Filler:
    """Writes a value into the Tensor that a group holds; others may hold on to it."""

    def __init__(self, index: int | None) -> None:
        self.index = index

    def __call__(self, group: dict[str, Any], key: str, value: Number) -> None:
        held: Any = group[key] if self.index is None else group[key][self.index]
        if not isinstance(held, Tensor):
            write([group], {key if self.index is None else f"{key}[{self.index}]": [value]})
            return
        with torch.no_grad():
            held.fill_(value.squeeze() if isinstance(value, Tensor) else value)


def holds_tensors(values: Sequence[Any]) -> bool:
    """Whether one of the values is a Tensor."""
    return any(issubclass(kind, Tensor) for kind in set(map(type, values)))


def require(groups: Groups, name: str, owner: str) -> None:
    """Check that every group has this hyperparameter, and that it is a number.

    Raises:
        ValueError: a group lacks it
        TypeError: it is no number
    """
    key, index = _split(name)
    for position, group in enumerate(groups):
        place = f"{owner}, group {position}"
        items: Any = group.get(key)
        if key not in group or (index is not None and not _has_item(items, index)):
            raise ValueError(f"{place}: there is no hyperparameter '{name}'; {_hint(group, key)}")
        value = items if index is None else items[index]
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            hint = f"; name one of its items, '{name}[0]'" if isinstance(value, tuple) else ""
            raise TypeError(f"{place}: '{name}' is no number but {value!r}{hint}")


def _has_item(items: Any, index: int) -> bool:
    return isinstance(items, (tuple, list)) and index < len(items)


def _hint(group: Mapping[str, Any], key: str) -> str:
    names = [name for name in group if name not in ("params", "param_names")]
    close = near_miss(key, names)
    return f"did you mean '{close}'?" if close else f"it has {', '.join(names)}"
