"""Rules: whether what a file holds was trained by the rule that is to go on with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..language import Transform
from ..matching import EXECUTION
from ..optimizer import Optimizer
from .contents import composition_of, rule_of, without_transforms

__all__ = ["rule_differences"]

LATER = (*EXECUTION, "maximize", "decoupled_weight_decay")
"""Hyperparameters that torch added later, like keyword-only arguments; older files lack them."""

PART = re.compile(r"(?:\(|, )([^=]+)=(\w+)")
"""A name and a rule in what combined optimizers are called."""


def rule_differences(
    optimizer: Optimizer, packed: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Why saved groups are not of this optimizer's rule, or have another's hyperparameters.

    A file that was converted does not name its rule, which is then known by the hyperparameters.

    Args:
        optimizer: what would go on
        packed: the optimizer in the file
        groups: its groups
    """
    rule, own = packed["rule"], rule_of(optimizer)
    if rule and without_transforms(rule) != own:
        return [f"the rule: the file has state of {rule}, not {own}{_renamed(rule, own)}"]
    known = {
        *optimizer.declaration.fields,
        *EXECUTION,
        *(key for group in optimizer.param_groups for key in group),
    }
    foreign = _of_others(optimizer, rule, bool(packed["state"])) - known
    found = []
    for index, group in enumerate(groups):
        differences = [*_values(group, foreign, optimizer)]
        differences += _lacking(group, optimizer) if packed["state"] and not rule else []
        found += [f"group {index}: {words}" for words in differences]
    return found


def _renamed(rule: str, own: str) -> str:
    """Return the remedy if combined optimizers differ only in their names, else an empty text."""
    saved, ours = PART.findall(without_transforms(rule)), PART.findall(own)
    if not saved or sorted(kind for _, kind in saved) != sorted(kind for _, kind in ours):
        return ""
    return f"; give the optimizers their saved names: {', '.join(repr(name) for name, _ in saved)}"


def _of_others(optimizer: Optimizer, rule: str, has_state: bool) -> set[str]:
    """The hyperparameters that tell that a file is of another rule, or composed with more.

    What is in a group of this very rule, and none of its hyperparameters, its user has put there.
    """
    if rule:
        is_same = rule in (rule_of(optimizer), composition_of(optimizer))
        return set() if is_same else _of_transforms()
    # a subclass in torch's manner does not say what it has; before a first step all are alike
    return _of_any_rule() if optimizer.declaration.fields and has_state else set()


def _of_any_rule() -> set[str]:
    rules: list[type[Optimizer]] = [Optimizer]
    for rule in rules:
        rules += rule.__subclasses__()
    return {name for rule in rules for name in rule.declaration.rule_fields} | _of_transforms()


def _of_transforms() -> set[str]:
    # what a transform keeps is state, which is reported where it is not expected
    transforms = [each for each in Transform.__subclasses__() if not each.slots]
    return {name for each in transforms for name in each.fields}


def _values(group: Mapping[str, Any], foreign: set[str], optimizer: Optimizer) -> Iterator[str]:
    owner = rule_of(optimizer)
    for key in group:
        if key in foreign:
            yield f"{key}={group[key]}, which {owner} does not have"
    for field in optimizer.declaration.fields.values():
        value = group.get(field.name, field.default)
        if field.fixed and not (type(value) is type(field.default) and value == field.default):
            yield f"{field.name}={value}, which is {field.default} for {owner}"


def _lacking(group: Mapping[str, Any], optimizer: Optimizer) -> list[str]:
    """Return the signs that a file without the name of its rule was saved by another rule."""
    names = [
        field.name
        for field in optimizer.declaration.fields.values()
        if not (field.keyword_only or field.fixed or field.name in LATER)
        and field.name not in group
    ]
    return [f"no {', '.join(names)}, which {rule_of(optimizer)} has"] if names else []
