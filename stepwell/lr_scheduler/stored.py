"""Check a loaded state: each entry must be of the same kind as the attribute it replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any

from ..language.number import is_number

KEPT = (
    *("base_lrs", "last_epoch", "_last_lr", "_step_count", "_is_initial"),
    *("_get_lr_called_within_step", "_schedulers", "_milestones", "initial_values", "lr_lambdas"),
    *("T_cur", "T_i", "total_size", "step_ratio", "_scale_fn_custom", "_schedule_phases"),
    *("_anneal_func_type", "_anneal_strategy", "use_beta1", "base_momentums", "max_momentums"),
    *("max_lrs", "min_lrs", "default_min_lr", "best", "mode_worse", "num_bad_epochs"),
    "cooldown_counter",
)
"""Attributes that schedules keep beside their arguments."""


@cache
def declared_attributes(kinds: tuple[type, ...]) -> frozenset[str]:
    """Return this package's attributes in these classes: their arguments, and `KEPT`."""
    root = __name__.partition(".")[0]
    made = [base.__init__ for base in kinds if base.__module__.partition(".")[0] == root]  # type: ignore[misc]
    arguments = [signature(each).parameters for each in made]
    return frozenset(KEPT).union(*arguments)


def check_kinds(state: Mapping[str, Any], known: Mapping[str, Any], owner: str) -> None:
    """Check that entries are of the kinds of the attributes that they will replace.

    Raises:
        TypeError: one is not; it may have been changed by hand, or be that of another class
    """
    for key in state.keys() & known.keys():
        kind, fits = _kind(known[key])
        if not fits(state[key]):
            raise TypeError(
                f"{owner}: the state's {key!r} must be {kind}, got {state[key]!r} "
                f"({type(state[key]).__name__})"
            )


def as_state(state_dict: Any, owner: str) -> dict[str, Any]:
    """The entries of a state dict.

    Raises:
        TypeError: it is none
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{owner}: state_dict must be a dict, as state_dict() returns it, got "
            f"{type(state_dict).__name__}"
        )
    return dict(state_dict)


def _kind(own: Any) -> tuple[str, Callable[[Any], bool]]:
    """The kind of an attribute, in words and as a test."""
    if isinstance(own, bool):
        return "True or False", lambda value: isinstance(value, bool)
    if is_number(own):
        return "a number", is_number
    if isinstance(own, str):
        return "a text", lambda value: isinstance(value, str)
    if isinstance(own, Mapping):
        return "a dict", lambda value: isinstance(value, Mapping)
    if isinstance(own, Sequence) and own and all(map(is_number, own)):
        return "a list of numbers", lambda value: _is_list(value) and all(map(is_number, value))
    if isinstance(own, Sequence):
        return "a list", _is_list
    return "anything", lambda value: True


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
