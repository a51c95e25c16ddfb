"""Schedules: tried before they are loaded; saved rates go where the group is that had them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import copy, deepcopy
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..lr_scheduler.scheduler import Stage
from ..matching import Match, are_alike
from .states import SMALL

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

KEPT = (FunctionType, MethodType, BuiltinFunctionType, ModuleType, type, Enum, Module, Optimizer)
"""What has attributes that no schedule loads."""


def class_of(scheduler: Any) -> str:
    """What a schedule is called, as in "SequentialLR(LinearLR, StepLR)"."""
    parts = getattr(scheduler, "_schedulers", ())
    name = type(scheduler).__name__
    return f"{name}({', '.join(map(class_of, parts))})" if parts else name


VALUES = "initial_values"
"""The entry with a list of one item per group for each hyperparameter."""


def regrouped(state: Any, own: Any, matched: Match, per_group: Collection[str] = PER_GROUP) -> Any:
    """The state dict of a schedule for groups that were split, put together or in other places.

    Args:
        state: what was saved, of one schedule or of several in one
        own: what the schedule has now; a group that was not saved keeps it
        matched: which saved group each group is matched with
        per_group: the entries with one item for each group
    """
    if not isinstance(state, Mapping) or not isinstance(own, Mapping):
        return state
    made = {}
    for key, value in state.items():
        made[key] = value
        if _holds_parts(key, value, own):
            pairs = zip(value, own[key], strict=True)
            made[key] = [regrouped(each, of, matched) for each, of in pairs]
        elif key == VALUES and isinstance(value, Mapping):
            made[key] = regrouped(value, own.get(key), matched, value.keys())
        elif key in per_group and _has_all(value, own.get(key), matched):
            kept = zip(matched.groups, own[key], strict=True)
            made[key] = [mine if source is None else value[source] for source, mine in kept]
    return made


def differences(
    state: Any, own: Any, matched: Match, per_group: Collection[str] = PER_GROUP
) -> Iterator[str]:
    """What a schedule has of its own for each of several groups that have become one."""
    if not isinstance(state, Mapping) or not isinstance(own, Mapping):
        return
    for key, value in state.items():
        if _holds_parts(key, value, own):
            for each, of in zip(value, own[key], strict=True):
                yield from differences(each, of, matched)
        elif key == VALUES and isinstance(value, Mapping):
            yield from differences(value, own.get(key), matched, value.keys())
        elif key in per_group and _has_all(value, own.get(key), matched):
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


def _has_all(value: Any, mine: Any, matched: Match) -> bool:
    """Return whether both lists have an item for each group."""
    if not isinstance(value, list) or not isinstance(mine, list):
        return False
    sources = [source for origins in matched.origins for source in origins]
    return len(mine) == len(matched.groups) and max(sources, default=-1) < len(value)


def restorer(scheduler: Any) -> Callable[[], None]:
    """Return a function that restores the present state of a schedule, its parts and callables."""
    kept: dict[int, tuple[Any, dict[str, Any]]] = {}

    def remember(part: Any) -> Any:
        if id(part) not in kept:
            kept[id(part)] = part, {}
            kept[id(part)][1].update(_state(part, part is scheduler, remember))
        return part

    remember(scheduler)

    def restore() -> None:
        for part, state in kept.values():
            for name in vars(part).keys() - state.keys():
                del vars(part)[name]
            vars(part).update(state)

    return restore


def rehearse(scheduler: Any, state: Any) -> None:
    """Load the state into a copy, which refuses what the schedule would refuse.

    Raises:
        Exception: whatever the schedule raises
        ValueError: the state would take the place of a method or property
    """
    copied = _double(scheduler, getattr(scheduler, "optimizer", None))
    copied.load_state_dict(deepcopy(state))
    replaced = _methods(copied) - _methods(scheduler)
    if replaced:
        raise ValueError(f"it has {', '.join(sorted(replaced))}, which are no state")


def _double(scheduler: Any, optimizer: Any) -> Any:
    """A copy that drives copies of the groups, and has copies of what it calls."""
    stage = None if optimizer is None else Stage(optimizer)
    made: dict[int, Any] = {}

    def double(part: Any) -> Any:
        if id(part) not in made:
            made[id(part)] = copied = _empty(type(part))
            if copied is None:
                made[id(part)] = part
                return part
            vars(copied).update(_state(part, part is scheduler, double))
            if stage is not None and vars(part).get("optimizer") is optimizer:
                # what is loaded into the optimizer is not seen
                vars(copied).update(optimizer=stage, _loads_seen=None)
        return made[id(part)]

    return double(scheduler)


def _empty(kind: type) -> Any:
    """An object of a class without attributes, or None where its attributes are not all it has."""
    try:
        return None if hasattr(kind, "__del__") else object.__new__(kind)
    except TypeError:
        return None


def _state(part: Any, is_whole: bool, visit: Callable[[Any], Any]) -> dict[str, Any]:
    """The attributes of a schedule, copied; those of what it holds or calls, as they are."""
    if not (is_whole or isinstance(part, LRScheduler)):
        return dict(vars(part))
    return {name: _copied(value, visit) for name, value in vars(part).items()}


def _copied(value: Any, visit: Callable[[Any], Any]) -> Any:
    """A copy of plain data; what `visit` makes of objects in it. Large tensors are not copied."""
    if isinstance(value, Tensor):
        is_plain = not value.requires_grad and value.numel() * value.element_size() <= SMALL
        return value.clone() if is_plain else value
    if isinstance(value, dict):
        made = copy(value)
        made.update({key: _copied(item, visit) for key, item in value.items()})
        return made
    if isinstance(value, (list, deque)) or type(value) in (tuple, set):
        return type(value)(_copied(item, visit) for item in value)
    if isinstance(value, KEPT) or not hasattr(value, "__dict__"):
        return value
    return visit(value)


def _methods(scheduler: Any) -> set[str]:
    """Methods and properties, of a schedule and its parts, in whose place something else stands."""
    kind = type(scheduler)
    own = {name for name in vars(scheduler) if _is_of_class(getattr(kind, name, None))}
    return own.union(*map(_methods, vars(scheduler).get("_schedulers", ())))


def _is_of_class(attribute: Any) -> bool:
    return callable(attribute) or hasattr(attribute, "__set__")
