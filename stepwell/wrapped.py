"""Optimizers and schedules inside of what frameworks put around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["inner_optimizer", "inner_scheduler", "innermost"]


def inner_optimizer(optimizer: Any, owner: str) -> Optimizer:
    """The optimizer inside of all wrappers, as those of accelerate and Lightning.

    Args:
        optimizer: with or without a wrapper, which has the groups of what is inside
        owner: whom messages name

    Raises:
        TypeError: it is no optimizer, or a wrapper that saves more than what is inside
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{owner}: optimizer must be a torch.optim.Optimizer, got "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        )
    inside = _inside(optimizer)
    if inside is None:
        return optimizer
    name, inner = inside
    _check_saves_the_same(optimizer, inner, name, owner)
    return inner_optimizer(inner, owner)


def innermost(source: Any) -> Any:
    """The optimizer inside of all wrappers, to be looked at; anything else as it is."""
    inside = _inside(source) if isinstance(source, Optimizer) else None
    return source if inside is None else innermost(inside[1])


def _inside(optimizer: Any) -> tuple[str, Any] | None:
    """The optimizer that this one is around, and the attribute that has it."""
    held = _held(optimizer, Optimizer)
    return next((found for found in held if _have_same_groups(optimizer, found[1])), None)


def inner_scheduler(scheduler: Any) -> Any:
    """The schedule inside of a wrapper that is none itself and saves nothing else."""
    if isinstance(scheduler, LRScheduler):
        return scheduler
    held = list(_held(scheduler, LRScheduler))
    if len(held) == 1 and _saves(scheduler) == _saves(held[0][1]):
        return held[0][1]
    return scheduler


def _held(wrapper: Any, kind: type) -> Iterator[tuple[str, Any]]:
    """The attributes of a wrapper that are of this kind."""
    for name, value in getattr(wrapper, "__dict__", {}).items():
        if isinstance(value, kind) and value is not wrapper:
            yield name, value


def _have_same_groups(one: Any, other: Any) -> bool:
    groups = [getattr(each, "param_groups", None) for each in (one, other)]
    if not all(isinstance(each, list) for each in groups):
        return False
    return bool(groups[0]) and [*map(id, groups[0] or ())] == [*map(id, groups[1] or ())]


def _check_saves_the_same(wrapper: Any, inner: Any, name: str, owner: str) -> None:
    """Refuse a wrapper that has state of its own, which would be lost."""
    method = type(wrapper).state_dict
    if method is Optimizer.state_dict and wrapper.state is not inner.state:
        more = "state"
    elif method is type(inner).state_dict:
        return
    else:
        outer, own = _saves(wrapper), _saves(inner)
        if outer == own:
            return
        raised = [f"its state dict raises {e!r}" for e in outer if isinstance(e, Exception)]
        keys = sorted(str(key) for key in outer - own if isinstance(key, str))
        more = ", ".join(raised or keys)
    kind = type(wrapper).__name__
    raise TypeError(
        f"{owner}: optimizer is a {kind} around {type(inner).__name__}, and keeps more than what "
        f"is inside ({more or 'its state dict is another'}): pass the optimizer inside, which is "
        f"its {name}, and the rest as extra"
    )


def _saves(holder: Any) -> frozenset[Any]:
    """Return the keys of a state dict, and those of the state of each parameter.

    If the state dict cannot be read, return an error instead, which equals nothing else.
    """
    try:
        state_dict = holder.state_dict()
    # wrappers raise whatever they like
    except Exception as error:
        return frozenset([error])
    if not isinstance(state_dict, Mapping):
        return frozenset([TypeError(f"{type(state_dict).__name__} is no dict")])
    state = state_dict.get("state")
    entries = state.items() if isinstance(state, Mapping) else ()
    return frozenset(state_dict) | {
        (parameter, key)
        for parameter, entry in entries
        if isinstance(entry, Mapping)
        for key in (None, *entry)
    }
