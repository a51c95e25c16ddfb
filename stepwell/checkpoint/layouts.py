"""Find the model, the optimizer and the schedule in a file of torch.

People, and the libraries that they train with, save these parts under various keys. State dicts of
optimizers and schedules are also recognized by their entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .header import CheckpointError

__all__ = ["Parts", "parts_of"]

SPELLINGS = {
    # first, so that tied weights have the model's names
    "model": ("model", "model_state_dict", "model_state", "state_dict"),
    # as `to_torch` writes it
    "averaged": ("averaged",),
    "optimizer": (
        "optimizer",
        "optimizer_state_dict",
        "optimizer_state",
        "optim",
        "optim_state_dict",
        "opt",
        "optimizers",
        # of Lightning and fairseq
        "optimizer_states",
        "last_optimizer_state",
    ),
    "scheduler": (
        "scheduler",
        "scheduler_state_dict",
        "scheduler_state",
        "lr_scheduler",
        "lr_scheduler_state_dict",
        "schedulers",
        # of Lightning and mmengine
        "lr_schedulers",
        "param_schedulers",
    ),
}
"""Under which keys people save what, after the examples in torch's documentation."""

SCHEDULES = (
    {"last_epoch", "_step_count"},
    {"last_epoch", "base_lrs"},
    {"num_bad_epochs", "best"},
    {"last_step", "base_values"},
)
"""Keys that only the state dicts of schedules have: torch's, ReduceLROnPlateau's, mmengine's."""

DEEPEST = 6
"""Depth to which the part that becomes `extra` is searched for state dicts."""


class Parts(NamedTuple):
    """The parts that were recognized in a file.

    Attributes:
        found: state dicts under "model", "averaged", "optimizer" and "scheduler", and everything
            else as "extra"
        left: what is in `extra`; first, where there seem to be optimizers, schedules and models
    """

    found: dict[str, Any]
    left: list[str]


def parts_of(content: Any, asked: Mapping[str, str | None]) -> Parts:
    """The parts of what `torch.load` gave.

    Args:
        content: a state dict, or a dict or list with some
        asked: for "optimizer" and "scheduler" the place of the one to take, such as
            "optimizer_states.1", where there are several

    Raises:
        CheckpointError: nothing is recognized, or several optimizers, of which none was asked for
    """
    if isinstance(content, (list, tuple)):
        content = {str(index): item for index, item in enumerate(content)}
    elif not isinstance(content, Mapping):
        raise CheckpointError(f"holds no state dicts, but is of type {type(content).__name__}")
    if _is_optimizer(content):
        content = {"optimizer": content}
    places = {part: _chosen(content, part, asked.get(part)) for part in SPELLINGS}
    found = {part: _at(content, place) for part, place in places.items() if place is not None}
    if found:
        extra = _without(content, [place for place in places.values() if place is not None])
        left = _left(extra)
        if beside := _beside(found.get("optimizer")):
            place = str(places["optimizer"])
            extra[place] = beside
            left += [f"{place}.{key}" for key in beside]
        if not extra:
            return Parts(found, left)
        # as `to_torch` writes it
        is_extra = extra.keys() == {"extra"}
        return Parts({**found, "extra": extra["extra"] if is_extra else extra}, left)
    if _is_schedule(content):
        return Parts({"scheduler": content}, [])
    if _is_model(content):
        return Parts({"model": content}, [])
    keys = ", ".join(f"{key!s:.40}" for key in [*content][:20]) or "nothing"
    raise CheckpointError(
        f"holds neither the state dict of an optimizer nor that of a model; it has {keys}"
    )


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()


def _beside(state_dict: Any) -> dict[Any, Any]:
    """Return the entries that wrappers added to an optimizer's state dict, such as a loss scale."""
    if not _is_optimizer(state_dict):
        return {}
    return {k: value for k, value in state_dict.items() if k not in ("state", "param_groups")}


def _is_schedule(value: Any) -> bool:
    return isinstance(value, Mapping) and any(keys <= value.keys() for keys in SCHEDULES)


def _is_model(value: Any) -> bool:
    is_filled = isinstance(value, Mapping) and len(value) > 0
    return is_filled and all(isinstance(item, Tensor) for item in value.values())


def _chosen(content: Mapping[Any, Any], part: str, asked: str | None) -> str | None:
    """The place of the one to take, or None if there is none."""
    places = list(dict.fromkeys(_places(content, part)))
    if asked is not None:
        if not isinstance(_at(content, asked), Mapping):
            there = f"; state dicts of one are at {', '.join(places)}" if places else ""
            raise CheckpointError(f"has no {part} at {asked!r}{there}")
        return asked
    if len(places) < 2:
        return places[0] if places else None
    if part == "scheduler":
        # a training goes on without it; they are said to be left
        return None
    how = f"; say which, with {part}= or --{part}" if part == "optimizer" else ""
    raise CheckpointError(f"holds {' and '.join(places)}, of which only one can be converted{how}")


def _places(content: Mapping[Any, Any], part: str) -> Iterator[str]:
    """Yield the places of state dicts of this kind, found by their key or by their entries."""
    is_one = {"optimizer": _is_optimizer, "scheduler": _is_schedule}.get(part, lambda _: False)
    for key, value in content.items():
        is_spelt = key in SPELLINGS[part]
        items = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        if not isinstance(key, str) or not isinstance(items, Mapping):
            continue
        held = [f"{key}.{name}" for name, item in items.items() if is_one(item)]
        # a model may be empty
        may_be_one = is_spelt and not held and (len(items) > 0 or part == "model")
        if isinstance(value, Mapping) and (is_one(value) or may_be_one):
            yield key
        else:
            yield from held


def _at(content: Any, place: str) -> Any:
    """Return the value at a place such as "optimizer_states.0", or None."""
    if isinstance(content, Mapping) and place in content:
        return content[place]
    key, _, rest = place.partition(".")
    if isinstance(content, Mapping):
        inner = content.get(key)
    elif isinstance(content, (list, tuple)) and key.isdecimal() and int(key) < len(content):
        inner = content[int(key)]
    else:
        return None
    return _at(inner, rest) if rest else inner


def _without(content: Mapping[Any, Any], places: Sequence[str]) -> dict[Any, Any]:
    """Everything but what is at these places; in a list of several, None is left of it."""
    kept = {key: value for key, value in content.items() if key not in places}
    for place in places:
        key, _, rest = place.partition(".")
        if place in content:
            continue
        items = kept.get(key)
        if isinstance(items, Mapping):
            kept[key] = _without(items, [rest])
        elif isinstance(items, (list, tuple)):
            kept[key] = [None if str(i) == rest else item for i, item in enumerate(items)]
        if not any(kept.get(key) or ()):
            kept.pop(key, None)
    return kept


def _left(extra: Mapping[Any, Any]) -> list[str]:
    """Return the places that are left: first those that seem to be parts of a training."""
    known: list[str] = []
    others: list[str] = []
    for key, item in extra.items():
        found = list(_trained(item, f"{key!s:.80}"))
        known += found
        is_empty = isinstance(item, (Mapping, list, tuple)) and not item
        others += [] if found or is_empty else [f"{key!s:.80}"]
    return known + others


def _trained(value: Any, place: str, seen: frozenset[int] = frozenset()) -> Iterator[str]:
    """Yield the places that seem to hold optimizers, schedules and models."""
    kinds = {"an optimizer": _is_optimizer, "a schedule": _is_schedule, "tensors": _is_model}
    for words, is_one in kinds.items():
        if is_one(value):
            yield f"{place} ({words})"
            return
    if id(value) in seen or len(seen) == DEEPEST:
        return
    items = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
    if isinstance(items, Mapping):
        for key, item in items.items():
            yield from _trained(item, f"{place}.{key}", seen | {id(value)})
