"""Rules: whether what a file holds was trained by the rule that is to go on with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..language import Transform
from ..matching import EXECUTION
from ..optimizer import Optimizer
from .contents import rule_of

__all__ = ["rule_differences"]


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
    if rule and rule.partition("+")[0] != own:
        return [f"the rule: the file has state of {rule}, not {own}"]
    fields = optimizer.declaration.fields
    known = {*fields, *EXECUTION, *(key for group in optimizer.param_groups for key in group)}
    if rule:
        # of this rule: whatever else is in a group, its user has put there
        foreign = _of_transforms(rule) - known
    else:
        # a subclass in torch's manner does not say what it has; before a first step all are alike
        foreign = _of_any_rule() - known if fields and packed["state"] else set()
    found = []
    for index, group in enumerate(groups):
        differences = [*_values(group, foreign, optimizer)]
        differences += _lacking(group, optimizer) if packed["state"] and not rule else []
        found += [f"group {index}: {words}" for words in differences]
    return found


def _of_any_rule() -> set[str]:
    """The hyperparameters of all rules, and of all transforms that keep nothing."""
    rules: list[type[Optimizer]] = [Optimizer]
    for rule in rules:
        rules += rule.__subclasses__()
    of_rules = {name for rule in rules for name in rule.declaration.rule_fields}
    return of_rules | _fields(Transform.__subclasses__())


def _of_transforms(composition: str) -> set[str]:
    """The hyperparameters of the transforms in "AdamW+ClipNorm" that keep nothing."""
    names = composition.split("+")[1:]
    return _fields(each for each in Transform.__subclasses__() if each.__name__ in names)


def _fields(transforms: Iterable[type[Transform]]) -> set[str]:
    # what a transform keeps is state, which is reported where it is not expected
    return {name for each in transforms if not each.slots for name in each.fields}


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
    """What says that a file which does not know its rule is of another one.

    Keyword arguments have joined torch's rules over the years; older files lack them.
    """
    fields = optimizer.declaration.fields.values()
    names = [f.name for f in fields if not (f.keyword_only or f.fixed) and f.name not in group]
    return [f"no {', '.join(names)}, which {rule_of(optimizer)} has"] if names else []
