"""Schedules: tried before they are loaded; saved rates go where the group is that had them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor

from ..lr_scheduler.scheduler import Stage
from ..matching import Match, are_alike

__all__ = ["class_of", "differences", "regrouped", "rehearse", "restorer"]

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


def class_of(scheduler: Any) -> str:
    """What a schedule is called, as in "SequentialLR(LinearLR, StepLR)"."""
    parts = getattr(scheduler, "_schedulers", ())
    name = type(scheduler).__name__
    return f"{name}({', '.join(map(class_of, parts))})" if parts else name


def regrouped(state: Any, own: Any, matched: Match) -> Any:
    """The state dict of a schedule for groups that were split, put together or in other places.

    Args:
        state: what was saved, of one schedule or of several in one
        own: what the schedule has now; a group that was not saved keeps it
        matched: which saved group each group is matched with
    """
    if not isinstance(state, Mapping) or not isinstance(own, Mapping):
        return state
    made = {}
    for key, value in state.items():
        made[key] = value
        if _holds_parts(key, value, own):
            pairs = zip(value, own[key], strict=True)
            made[key] = [regrouped(each, of, matched) for each, of in pairs]
        elif _is_per_group(key, value, own, matched):
            kept = zip(matched.groups, own[key], strict=True)
            made[key] = [mine if source is None else value[source] for source, mine in kept]
    return made


def differences(state: Any, own: Any, matched: Match) -> Iterator[str]:
    """What a schedule has of its own for each of several groups that have become one."""
    if not isinstance(state, Mapping) or not isinstance(own, Mapping):
        return
    for key, value in state.items():
        if _holds_parts(key, value, own):
            for each, of in zip(value, own[key], strict=True):
                yield from differences(each, of, matched)
        elif _is_per_group(key, value, own, matched):
            for index, sources in enumerate(matched.origins):
                values = [value[source] for source in sources]
                if values and not are_alike(values):
                    yield (
                        f"scheduler: group {index}: its parameters were in groups "
                        f"{', '.join(map(str, sources))}, whose {key} differ "
                        f"({', '.join(map(str, values))})"
                    )


def _holds_parts(key: str, value: Any, own: Mapping[str, Any]) -> bool:
    parts = own.get(key)
    both_lists = isinstance(value, list) and isinstance(parts, (list, tuple))
    return key == "_schedulers" and both_lists and len(value) == len(parts or ())


def _is_per_group(key: str, value: Any, own: Mapping[str, Any], matched: Match) -> bool:
    mine = own.get(key)
    if key not in PER_GROUP or not isinstance(value, list) or not isinstance(mine, list):
        return False
    sources = [source for origins in matched.origins for source in origins]
    return len(mine) == len(matched.groups) and max(sources, default=-1) < len(value)


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
