"""Schedules: the rates that one has saved for each group go where that group is now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["regrouped"]

PER_GROUP = frozenset(
    [
        "_last_lr",
        "base_lrs",
        "base_momentums",
        "lr_lambdas",
        "max_lrs",
        "max_momentums",
        "min_lrs",
        "swa_lrs",
    ]
)
"""Lists with one item for each group of the optimizer."""


def regrouped(state: Any, own: Any, sources: Sequence[int | None]) -> Any:
    """The state dict of a schedule for groups that were split, put together or in other places.

    Args:
        state: what was saved, of one schedule or of several in one
        own: what the schedule has now; a group that was not saved keeps it
        sources: for each group the saved one, if there is one
    """
    if not isinstance(state, Mapping) or not isinstance(own, Mapping):
        return state
    return {key: _regrouped(key, value, own.get(key), sources) for key, value in state.items()}


def _regrouped(key: str, value: Any, own: Any, sources: Sequence[int | None]) -> Any:
    if not isinstance(value, list) or not isinstance(own, list):
        return value
    if key == "_schedulers" and len(value) == len(own):
        return [regrouped(each, of, sources) for each, of in zip(value, own, strict=True)]
    if key in PER_GROUP and len(own) == len(sources) and _known(value, sources):
        pairs = zip(sources, own, strict=True)
        return [kept if source is None else value[source] for source, kept in pairs]
    return value


def _known(value: Sequence[Any], sources: Sequence[int | None]) -> bool:
    return all(source is None or source < len(value) for source in sources)
