"""Splitting: the one way in which builders make groups finer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..param_groups import Times
from .naming import Collected, Group, Named

__all__ = ["Part", "split"]


@dataclass(frozen=True, eq=False)
class Part:
    """What some parameters get: a title, and hyperparameters that come before those they had."""

    title: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def split(
    collected: Collected, parts: Sequence[Part], part_of: Callable[[Named], Part]
) -> list[Group]:
    """Each group cut into those of its parameters that get the same part, in the order of parts."""
    return [
        _joined(group, part, members)
        for group in collected.groups
        for part in parts
        if (members := [named for named in group["params"] if part_of(named) is part])
    ]


def _joined(group: Group, part: Part, members: list[Named]) -> Group:
    titles = [title for title in (group.get("name"), part.title) if title]
    made = {key: value for key, value in group.items() if key not in ("name", "params")}
    made |= {key: _over(group.get(key), value) for key, value in part.values.items()}
    name = {"name": ", ".join(titles)} if titles else {}
    return {**name, "params": members, **made}


def _over(held: Any, value: Any) -> Any:
    """A multiple multiplies what the group has; anything else takes its place."""
    return value.of(held) if isinstance(value, Times) and held is not None else value
