"""Matching: which part of a loaded state dict belongs to which parameter and group."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .language.number import is_fake

__all__ = [
    "EXECUTION",
    "LoadReport",
    "Match",
    "Place",
    "are_alike",
    "match",
    "nearest",
    "refusal",
    "shown",
    "with_nearest",
]

Group = Mapping[str, Any]

EXECUTION = ("foreach", "fused", "capturable", "differentiable")
"""How a machine runs a step: no part of what was trained."""

SHOWN = 10


class LoadReport(NamedTuple):
    """What of a state dict was not loaded; all empty if everything fitted.

    Attributes:
        missing: what the optimizer needs and the state dict lacks
        unexpected: what the state dict has and the optimizer does not know
        mismatched: entries of the wrong shape or kind
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether everything was loaded."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def listing(self) -> str:
        """The first entries of each kind, one to a line."""
        return self.listed(SHOWN)

    def listed(self, most: int) -> str:
        """Up to so many entries of each kind, one to a line."""
        return "".join(
            f"\n  {kind}: {entry}"
            for kind, entries in zip(self._fields, self, strict=True)
            for entry in shown(entries, most)
        )


def shown(entries: Sequence[str], most: int = SHOWN) -> list[str]:
    """As many of them as a user reads."""
    rest = len(entries) - most
    return [*entries[:most], f"... and {rest} more"] if rest > 0 else list(entries)


class Place(NamedTuple):
    """A parameter of the optimizer, the index of its group, and what messages call it."""

    param: Tensor
    group: int
    label: str


@dataclass
class Match:
    """What belongs to what.

    Attributes:
        params: a parameter for each saved id
        groups: for each group the saved one that it is matched with, if there is one
        origins: for each group all the saved ones that its parameters were in
        report: what has no counterpart, and what was not alike and has become one
        by_name: whether names have decided it
    """

    params: dict[Any, Place]
    groups: list[int | None]
    origins: list[list[int]]
    report: LoadReport
    by_name: bool

    def source(self, group: int, saved: Sequence[Group]) -> Group:
        """The saved group with which a group is matched, or an empty one."""
        index = self.groups[group]
        return {} if index is None else saved[index]


def match(owner: str, groups: Sequence[Group], saved: Sequence[Group], strict: bool) -> Match:
    """Match by name where both sides know all names, else by order.

    By name, parameters and groups may have changed places, and groups may have been split or put
    together: a group is matched with the saved group that most of its parameters were in, and it
    is reported if they were in several that differ. By order, as torch does it, the first goes to
    the first of the same group, and so on.

    Raises:
        ValueError: without names, the groups differ in number, and `strict` asks that they do not
    """
    ours, theirs = _by_name(groups), _by_name(saved)
    if ours is not None and theirs is not None:
        return _match_names(groups, saved, ours, theirs)
    if strict and len(groups) != len(saved):
        raise ValueError(_other_number(owner, groups, saved, "; strict=False loads what fits"))
    return _match_order(groups, saved)


def _other_number(owner: str, groups: Sequence[Group], saved: Sequence[Group], end: str) -> str:
    return (
        "loaded state dict has a different number of parameter groups "
        f"({owner}: {len(saved)} in the state dict, {len(groups)} in the optimizer{end})"
    )


def _by_name(groups: Sequence[Group]) -> dict[str, tuple[Any, int]] | None:
    """Parameter (or id) and index of the group by name; None if names are missing or repeated."""
    named: dict[str, tuple[Any, int]] = {}
    for index, group in enumerate(groups):
        names = group.get("param_names")
        if not isinstance(names, (list, tuple)) or len(names) != len(group["params"]):
            return None
        for name, param in zip(names, group["params"], strict=True):
            if not isinstance(name, str) or name in named:
                return None
            named[name] = (param, index)
    return named


def _match_names(
    groups: Sequence[Group],
    saved: Sequence[Group],
    ours: Mapping[str, tuple[Any, int]],
    theirs: Mapping[str, tuple[Any, int]],
) -> Match:
    missing = [name for name in ours if name not in theirs]
    unexpected = [name for name in theirs if name not in ours]
    shared: list[Counter[int]] = [Counter() for _ in groups]
    params: dict[Any, Place] = {}
    for name, (param, index) in ours.items():
        if name in theirs:
            saved_id, saved_index = theirs[name]
            params[saved_id] = Place(param, index, name)
            shared[index][saved_index] += 1
    pairs = [_source(index, counts, groups, saved) for index, counts in enumerate(shared)]
    origins = [sorted(counts) for counts in shared]
    report = LoadReport(
        with_nearest(missing, unexpected, "the state dict has"),
        with_nearest(unexpected, missing, "the optimizer has"),
        tuple(_ambiguities(origins, pairs, saved)),
    )
    return Match(params, pairs, origins, report, by_name=True)


def _source(
    index: int, counts: Counter[int], groups: Sequence[Group], saved: Sequence[Group]
) -> int | None:
    """The saved group that shares the most names with this one, which has a count of each."""
    if counts:
        return max(counts, key=lambda i: (counts[i], i == index, -i))
    is_empty = index < len(saved) and not (groups[index]["params"] or saved[index]["params"])
    return index if is_empty else None


def _ambiguities(
    origins: Sequence[Sequence[int]], pairs: Sequence[int | None], saved: Sequence[Group]
) -> Iterator[str]:
    """What the saved groups differ in that have become one, or parts of one."""
    for index, sources in enumerate(origins):
        differing = list(_differences([saved[i] for i in sources]))
        if differing:
            yield (
                f"group {index}: its parameters were in groups {', '.join(map(str, sources))} of "
                f"the state dict, which differ in {', '.join(differing)} (if not strict, those of "
                f"group {pairs[index]} are taken)"
            )


def _differences(groups: Sequence[Group]) -> Iterator[str]:
    if len(groups) < 2:
        return
    for key in dict.fromkeys(key for group in groups for key in group):
        if key not in ("params", "param_names", *EXECUTION):
            values = [group.get(key) for group in groups]
            if not are_alike(values):
                yield f"{key} ({', '.join(map(_words, values))})"


def are_alike(values: Sequence[Any]) -> bool:
    """Whether all values are the same; what cannot be compared is not."""
    try:
        return all(_is_same(values[0], value) for value in values[1:])
    # users put whatever they like into groups
    except Exception:
        return False


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        # what has no values yet cannot differ
        if any(value.is_meta or is_fake(value) for value in (one, other)):
            return one.shape == other.shape
        return one.shape == other.shape and torch.equal(one, other.to(one))
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_same(one[k], other[k]) for k in one)
    one, other = _number(one), _number(other)
    same = one == other
    # arrays compare item by item; a NaN is not even itself
    return bool(same.all() if hasattr(same, "all") else same or (one != one and other != other))


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _words(value: Any) -> str:
    if type(value) is tuple:
        return f"({', '.join(map(_words, value))})"
    value = _number(value)
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)


def with_nearest(names: Sequence[str], others: Sequence[str], where: str) -> tuple[str, ...]:
    """The names, each with the one among the others that it may stand for."""
    # only for those that will be shown: it takes time
    return (*(nearest(name, others, where) for name in names[:SHOWN]), *names[SHOWN:])


def nearest(name: str, others: Sequence[str], where: str) -> str:
    """The name, with the one among the others that it may stand for."""
    # a wrapper, as DistributedDataParallel, puts something in front of all names
    close = [o for o in others if o.endswith(f".{name}") or name.endswith(f".{o}")]
    if not close and len(others) <= 1000:
        close = difflib.get_close_matches(name, others, n=1)
    return f"{name} ({where} {close[0]})" if close else name


def _match_order(groups: Sequence[Group], saved: Sequence[Group]) -> Match:
    params: dict[Any, Place] = {}
    missing: list[str] = []
    unexpected: list[str] = []
    first = 0
    for index, group in enumerate(groups):
        ids = saved[index]["params"] if index < len(saved) else []
        names = group.get("param_names") or ()
        for i, param in enumerate(group["params"]):
            # a user may have replaced the parameters, and not their names
            label = (
                names[i]
                if len(names) == len(group["params"])
                else f"parameter {first + i} (group {index})"
            )
            if i < len(ids):
                params.setdefault(ids[i], Place(param, index, label))
            else:
                missing.append(label)
        unexpected += [f"parameter id {i} (group {index})" for i in ids[len(group["params"]) :]]
        first += len(group["params"])
    for index in range(len(groups), len(saved)):
        unexpected += [f"parameter id {i} (group {index})" for i in saved[index]["params"]]
    pairs = [index if index < len(saved) else None for index in range(len(groups))]
    origins = [[] if index is None else [index] for index in pairs]
    report = LoadReport(tuple(missing), tuple(unexpected))
    return Match(params, pairs, origins, report, by_name=False)


def refusal(
    owner: str, groups: Sequence[Group], saved: Sequence[Group], matched: Match, report: LoadReport
) -> str:
    """What to tell a user whose state dict does not fit."""
    sizes, saved_sizes = ([len(g["params"]) for g in side] for side in (groups, saved))
    said = f"{owner}: the loaded state dict does not fit this optimizer"
    if len(groups) != len(saved):
        said = _other_number(owner, groups, saved, "")
    elif sizes != saved_sizes:
        said = (
            "loaded state dict contains a parameter group that doesn't match the size of "
            f"optimizer's group ({owner})"
        )
    order = "; without param_names in it, parameters are matched by order"
    return (
        f"{said}:{report.listing}\n  (nothing was loaded; strict=False loads what fits"
        f"{order if matched.by_name else ''})"
    )
