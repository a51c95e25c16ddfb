"""Schedules: tried before they are loaded; saved rates go where the group is that had them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor

from ..lr_scheduler.scheduler import Stage

__all__ = ["regrouped", "rehearse", "restorer"]

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


def restorer(scheduler: Any) -> Callable[[], None]:
    """What gives a schedule its present state back."""
    optimizer = getattr(scheduler, "optimizer", None)
    kept = vars(deepcopy(scheduler, {id(optimizer): optimizer}))

    def restore() -> None:
        vars(scheduler).clear()
        vars(scheduler).update(kept)

    return restore


def rehearse(scheduler: Any, state: Any) -> None:
    """Load the state into a copy, which refuses what the schedule would refuse.

    Raises:
        Exception: whatever the schedule raises
        ValueError: the state would take the place of a method
    """
    optimizer = getattr(scheduler, "optimizer", None)
    stage = None if optimizer is None else Stage(optimizer)
    copied = deepcopy(scheduler, {id(optimizer): stage})
    copied.load_state_dict(deepcopy(state))
    replaced = _methods(copied) - _methods(scheduler)
    if replaced:
        raise ValueError(f"it has {', '.join(sorted(replaced))}, which are no state")
    for name, value in vars(copied).items():
        if not _alike(value, vars(scheduler).get(name)):
            raise ValueError(f"{name} is {value!r:.40}, which is {vars(scheduler)[name]!r:.40} now")


def _alike(value: Any, own: Any) -> bool:
    """Whether both are numbers, texts, or lists of such; what is not set is like anything."""
    if own is None or value is None:
        return True
    if isinstance(own, list) and isinstance(value, list):
        return all(_alike(each, own[0]) for each in value) if own else True
    numbers, texts = (int, float, Tensor), str
    return all(isinstance(value, kind) for kind in (numbers, texts, list) if isinstance(own, kind))


def _methods(scheduler: Any) -> set[str]:
    """The methods, of a schedule and of those in it, that something else stands in place of."""
    own = {name for name in vars(scheduler) if callable(getattr(type(scheduler), name, None))}
    return own.union(*map(_methods, vars(scheduler).get("_schedulers", ())))
