"""Held groups: what a step finds in `param_groups`, where others may have put in what they like."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .declaration import Declaration
from .param_groups import Group, check_param, params_of

__all__ = ["check_groups", "checked_group"]


def checked_group(group: Any, declaration: Declaration, index: int) -> Any:
    """The group as one that checks what is written to it, if there is anything to check."""
    if not declaration.fields or (type(group) is Group and group.belongs_to(declaration)):
        return group
    known = {name: f.default for name, f in declaration.fields.items()}
    return Group({**known, **group}, declaration, index)


def check_groups(groups: Any, declaration: Declaration) -> None:
    """Look at the groups before a step, for those that were put into `param_groups` by hand.

    They stay the dicts that they are, since others may hold on to them; a value of another type
    that means the same, such as a list for a tuple, is replaced.

    Raises:
        TypeError, ValueError, KeyError: one of them is no group of this rule; nothing is changed
    """
    if not isinstance(groups, (list, tuple)):
        kind = type(groups).__name__
        raise TypeError(f"{declaration.owner}: param_groups must be a list of dicts, got {kind}")
    changes = [_replacements(group, declaration, i) for i, group in enumerate(groups)]
    for group, new in zip(groups, changes, strict=True):
        if new:
            dict.update(group, new)


def _replacements(group: Any, declaration: Declaration, index: int) -> dict[str, Any]:
    """Return the values to replace in a group; none for a group that checks its own values."""
    place = f"{declaration.owner}, group {index}"
    if not isinstance(group, dict):
        raise TypeError(f"param_group must be a dict, but got {type(group)} ({place})")
    params = params_of(group, place)["params"]
    for i, param in enumerate(params):
        if not isinstance(param, Tensor):
            check_param(param, f"{place}, parameter {i}", differentiable=False)
    new = {} if type(group["params"]) is list else {"params": params}
    if not declaration.fields or (type(group) is Group and group.belongs_to(declaration)):
        return new
    lacks = [n for n, f in declaration.fields.items() if n not in group and not f.unlisted]
    if lacks:
        raise ValueError(
            "parameter group didn't specify a value of required optimization parameter "
            f"{', '.join(lacks)} ({place}: use add_param_group, which fills in what is missing)"
        )
    full = declaration.complete(group, {}, index)
    return {k: full[k] for k, value in group.items() if full[k] is not value} | new
