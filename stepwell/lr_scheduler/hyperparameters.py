"""Reading and writing one hyperparameter of all groups: "lr", "momentum", or one beta, "betas[0]".

Groups of stepwell's optimizers check what is written to them. Here all values are checked together
first, and then written, so that a refusal leaves every group as it was.
"""

from __future__ import annotations

import math
import operator
import re
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ..language.fields import SCHEDULED, near_miss
from ..matching import are_alike
from .watch import copied

Groups = Sequence[dict[str, Any]]
Number = float | Tensor
PLAIN = {float, int}
# entries of groups beside those that schedules write
NO_HYPERPARAMETERS = {"params", "param_names", "name", "optimizer"}


@lru_cache
def _split(name: str) -> tuple[str, int | None]:
    """ "betas[0]" -> ("betas", 0); a plain name has no index."""
    match = re.fullmatch(r"(\w+)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


def read(groups: Groups, name: str) -> list[Any]:
    """The values that the groups hold now; Tensors are those of the groups, no copies.

    A group that lacks the hyperparameter has None.
    """
    key, index = _split(name)
    try:
        held = list(map(operator.itemgetter(key), groups))
        return held if index is None else list(map(operator.itemgetter(index), held))
    except (KeyError, IndexError):
        return [_held(group, key, index) for group in groups]


def _held(group: Mapping[str, Any], key: str, index: int | None) -> Any:
    value: Any = group.get(key)
    if index is None:
        return value
    return value[index] if _has_item(value, index) else None


def holds(group: Mapping[str, Any], name: str) -> bool:
    """Return whether a group has this hyperparameter."""
    return _split(name)[0] in group


class Floats(list[Number]):
    """Plain floats for groups that hold plain numbers too: no further look is necessary.

    They go from a schedule to `write`, never to a user: a file may hold no such class.
    """


def write(groups: Groups, values: Mapping[str, Sequence[Number]]) -> dict[str, Sequence[Any]]:
    """Give each group its value of each hyperparameter; a Tensor is filled in place.

    Tensors among the values are copied, so that no group holds one that others hold. Of groups that
    share a Tensor, those that get another value than the first get a Tensor of their own. A group
    whose value is None is left alone.

    Returns:
        what the groups hold now under each key, where they hold no Tensors of their own

    Raises:
        ValueError, TypeError: a value is out of range; nothing is changed
    """
    ready: list[tuple[Groups, str, Any, Any]] = []
    for name, given in values.items():
        # of two items of one tuple, the second is put where the first already is
        made = {key: whole for _, key, whole, setitem in ready if not isinstance(setitem, _Filler)}
        ready.append(_prepared(groups, name, given, made))
    for having, key, whole, setitem in ready:
        if isinstance(setitem, _Filler):
            setitem.part(groups, key, dict(zip(map(id, having), whole, strict=True)))
        # a loop in C: a schedule does this at every step for every group
        deque(map(setitem, having, repeat(key), whole), maxlen=0)
    return {key: whole for _, key, whole, setitem in ready if not isinstance(setitem, _Filler)}


def check(groups: Groups, name: str, values: Sequence[Number]) -> None:
    """Check what `write` would check, and write nothing."""
    _prepared(groups, name, values, {})


def _prepared(
    groups: Groups, name: str, values: Sequence[Any], made: Mapping[str, Any]
) -> tuple[Groups, str, Any, Any]:
    """Return the groups, the key, the values and the function that writes one value.

    The values are checked together here, or one by one as they are written.
    """
    if len(values) != len(groups) or not groups:
        raise ValueError(f"{name}: got {len(values)} values for {len(groups)} groups")
    key, index = _split(name)
    is_plain = type(values) is Floats or are_plain(values)
    if not is_plain:
        if NoneType in map(type, values):
            pairs = zip(groups, values, strict=True)
            groups = [group for group, value in pairs if value is not None]
            values = [value for value in values if value is not None]
        values = list(map(copied, values))
    whole: Sequence[Any] = values
    if index is not None:
        tuples = _with_item(made.get(key) or read(groups, key), index, values, is_plain)
        if tuples is None:
            return groups, key, values, _Filler(index)
        whole = tuples
    elif type(values) is not Floats and holds_tensors(read(groups, name)):
        return groups, key, values, _Filler(index)
    takes = getattr(groups[0], "takes", None)
    if takes is None:
        return groups, key, whole, operator.setitem
    if not takes(key, span(values), index):
        whole = groups[0].check_all(groups, key, whole)  # type: ignore[attr-defined]
    return groups, key, whole, dict.__setitem__


def _with_item(
    held: Sequence[tuple[Number, ...]], index: int, values: Sequence[Number], is_plain: bool
) -> list[tuple[Number, ...]] | None:
    """Tuples in which one item is replaced, as in betas; None if that item is a Tensor."""
    first, count = held[0], len(held)
    if not is_plain and not holds_tensors([items[index] for items in held]):
        # either all items of a tuple are Tensors or none
        values = [value.item() if isinstance(value, Tensor) else value for value in values]
    if type(first[index]) is float and held.count(first) == values.count(values[0]) == count:
        # all groups are alike, as they mostly are
        return [(*first[:index], values[0], *first[index + 1 :])] * count
    columns = list(zip(*held, strict=True))
    if holds_tensors(columns[index]):
        return None
    columns[index] = tuple(values)
    return list(zip(*columns, strict=True))


def span(values: Sequence[Number]) -> Sequence[Number]:
    """The smallest and the largest of plain numbers: with them, all of them are in a range."""
    # a NaN, which min and max may miss, makes the sum NaN
    if type(values) is Floats and math.isfinite(sum(values)):
        return min(values), max(values)
    return values


class _Filler:
    """Writes a value into the Tensor that a group holds; others may hold on to it."""

    def __init__(self, index: int | None) -> None:
        self.index = index

    def part(self, groups: Groups, key: str, values: Mapping[int, Number]) -> None:
        """Give groups a Tensor of their own where the first that holds it gets another value."""
        first: dict[int, Number | None] = {}
        for group in groups:
            held, value = self._held(group, key), values.get(id(group))
            if not isinstance(held, Tensor):
                continue
            # where nothing is shared, a value is compared with itself, which waits for no device
            if not are_alike([first.setdefault(id(held), value), value]):
                own: Any = held.detach().clone()
                if self.index is not None:
                    own = (*group[key][: self.index], own, *group[key][self.index + 1 :])
                dict.__setitem__(group, key, own)

    def _held(self, group: dict[str, Any], key: str) -> Any:
        return group[key] if self.index is None else group[key][self.index]

    def __call__(self, group: dict[str, Any], key: str, value: Number) -> None:
        held = self._held(group, key)
        if not isinstance(held, Tensor):
            write([group], {key if self.index is None else f"{key}[{self.index}]": [value]})
            return
        with torch.no_grad():
            held.fill_(value.squeeze() if isinstance(value, Tensor) else value)


def are_plain(values: Sequence[Any]) -> bool:
    """Return whether all values are plain Python numbers."""
    return PLAIN.issuperset(map(type, values))


def holds_tensors(values: Sequence[Any]) -> bool:
    """Whether one of the values is a Tensor."""
    return not are_plain(values) and any(issubclass(kind, Tensor) for kind in map(type, values))


def require(groups: Groups, name: str, owner: str, driven: Sequence[int]) -> None:
    """Check that the groups that are driven have this hyperparameter, and that it is a number.

    Raises:
        ValueError: a group lacks it
        TypeError: it is no number
    """
    key, index = _split(name)
    having = [i for i, group in enumerate(groups) if _has(group, key, index)]
    for position in sorted({*driven, *having}):
        place, group = f"{owner}, group {position}", groups[position]
        if position not in having:
            hint = _hint(group, key, index)
            if having:
                some = ", ".join(f"{i}: curve" for i in having)
                named = f"{name}={{{some}}}" if index is None else f'**{{"{name}": {{{some}}}}}'
                hint = f"{hint}; name the groups that have it: {named}"
            raise ValueError(f"{place}: there is no hyperparameter '{name}'; {hint}")
        value = _held(group, key, index)
        if not isinstance(value, (int, float, Tensor)) or isinstance(value, bool):
            hint = f"; name one of its items, '{name}[0]'" if isinstance(value, tuple) else ""
            raise TypeError(f"{place}: '{name}' is no number but {value!r}{hint}")


def _has(group: Mapping[str, Any], key: str, index: int | None) -> bool:
    return key in group and (index is None or _has_item(group[key], index))


def _has_item(items: Any, index: int) -> bool:
    return isinstance(items, (tuple, list)) and index < len(items)


def _hint(group: Mapping[str, Any], key: str, index: int | None) -> str:
    names = [name for name in group if name not in NO_HYPERPARAMETERS | SCHEDULED]
    close = near_miss(key, names)
    if close and index is not None and _has_item(group[close], index):
        close = f"{close}[{index}]"
    return f"did you mean '{close}'?" if close else f"it has {', '.join(names)}"
