"""Parameter groups: from what a user passes to the dicts in `param_groups`."""

from __future__ import annotations

import math
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler as torch_schedules

from .compiling import leave_alone, outside_graphs
from .declaration import Declaration
from .hyperparameters import Checked
from .language.fields import Field, MissingKeyError, Range

__all__ = [
    "UNORDERED",
    "Group",
    "Times",
    "add_group",
    "as_groups",
    "check_company",
    "check_param",
    "check_waiting",
    "params_of",
]

UNORDERED = (
    "optimizer parameters need to be organized in ordered collections, but the ordering of tensors "
    "in sets will change between runs. Please use a list instead."
)
DUPLICATES = (
    "optimizer contains a parameter group with duplicate parameters; in future, this will cause an "
    "error; see github.com/pytorch/pytorch/issues/40967 for more information"
)


FACTOR = Field("factor", None, "number", Range(0))


@dataclass(frozen=True)
class Times:
    """In a group that is given to an optimizer: a multiple of the optimizer's own hyperparameter.

    `{"params": backbone, "lr": Times(0.1)}` learns at a tenth of the rate that the constructor is
    given. The optimizer replaces it by the product.

    Raises:
        ValueError, TypeError: `factor` is no finite number of at least 0
    """

    factor: float

    def __post_init__(self) -> None:
        FACTOR.check(self.factor, "Times")

    def of(self, value: Any) -> Any:
        """The product: a number for a number, `Times` for `Times`."""
        if isinstance(value, Times):
            return Times(self.factor * value.factor)
        return self.factor * value


class Group(Checked):
    """One of an optimizer's `param_groups`: a dict that refuses a value out of range.

    Keys that are no hyperparameter are kept, unless they look like a misspelling of one. A
    hyperparameter that torch's class of this name lacks, as `fused` of most, can always be read,
    but is one of the keys only where it differs from its default: then torch, which asks for each
    key of a group when it loads, finds in its own files all that it asks for. A copy is a plain
    dict, and what pickle makes of it an OrderedDict.

    Raises:
        ValueError, TypeError: when a hyperparameter is given a value that it cannot take
    """

    __slots__ = ("_declaration", "_ends", "_index")

    def __init__(self, items: Mapping[str, Any], declaration: Declaration, index: int) -> None:
        super().__init__(declaration.listed(items))
        rate = items.get("lr")
        # a copy of one that a schedule has left so; anything else has been checked
        self.waiting = ", as it was copied" if type(rate) is float and rate < 0 else ""
        self._declaration = declaration
        self._index = index
        self._ends = declaration.ends

    def belongs_to(self, declaration: Declaration) -> bool:
        """Return whether the group holds the hyperparameters of this rule."""
        return self._declaration is declaration

    def __missing__(self, key: str) -> Any:
        return self._declaration.unlisted[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value under the key, or `default` if there is none."""
        return self[key] if key in self or key in self._declaration.unlisted else default

    def __setitem__(self, key: str, value: Any) -> None:
        # torch's schedules write a rate into each group at every step: a short way for a float
        ends = self._ends.get(key)
        if ends is None or type(value) is not float or not ends[0] <= value <= ends[1]:
            value = self._taken(key, value)
            unlisted = self._declaration.unlisted
            if key in unlisted and value == unlisted[key]:
                self.pop(key, None)
                return
        dict.__setitem__(self, key, value)

    def takes(self, key: str, values: Sequence[Any], index: int | None = None) -> bool:
        """Whether groups of this optimizer may hold each of these values, as it is or as an item.

        A schedule writes the rates of all groups at every step, so they are looked at together.
        Where this says False, `check_all` says what is right.
        """
        field = self._declaration.fields.get(key)
        # the groups of combined optimizers are not all of this rule
        if (
            field is None
            or "optimizer" in self
            or (index is not None and index >= len(field.items))
        ):
            return False
        return (field if index is None else field.items[index]).admits(values)

    @staticmethod
    def check_all(groups: Sequence[Any], key: str, values: Sequence[Any]) -> Sequence[Any]:
        """The values that these groups may hold under the key, one each.

        Raises:
            ValueError, TypeError: one of them is out of range, or no number at all
        """
        return [
            group._checked(key, value) if isinstance(group, Group) else value
            for group, value in zip(groups, values, strict=True)
        ]

    @outside_graphs
    def _taken(self, key: str, value: Any) -> Any:
        """The value that is written: of a schedule of torch's, also one that no step may use.

        A schedule goes one step past its end, and two that share a rate pass it on below zero.
        """
        try:
            return self._checked(key, value)
        except ValueError:
            writer = _schedule_at_work()
            items = value if isinstance(value, tuple) else (value,)
            if not writer or not all(type(v) is float and math.isfinite(v) for v in items):
                raise
            self.waiting = f", as torch's {writer} has left it"
            return value

    def check_waiting(self) -> None:
        """Check what a schedule has left, before a step.

        Raises:
            ValueError: a step cannot use it
        """
        if self.waiting:
            where = f"group {self._index}{self.waiting}"
            for name, field in self._declaration.fields.items():
                field.check(self[name], self._declaration.owner, where)
            self.waiting = ""

    def _checked(self, key: str, value: Any) -> Any:
        if key == "params":
            place = f"{self._declaration.owner}, group {self._index}"
            return params_of({"params": value}, place)["params"]
        return self._declaration.checked(key, value, self._index)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """The value under the key, which becomes `default` if there is none."""
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Write several keys, or, if one of them is refused, none."""
        new = dict(*args, **kwargs)
        new = {key: self._checked(key, value) for key, value in new.items()}
        listed = self._declaration.listed(new)
        for key in new.keys() - listed.keys():
            self.pop(key, None)
        super().update(listed)

    def __ior__(self, other: Any) -> Group:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        memo[id(self)] = copied
        copied.update({deepcopy(k, memo): deepcopy(v, memo) for k, v in self.items()})
        return copied

    def __reduce__(self) -> Any:
        # the one kind of dict that pickle names and torch.load takes with weights_only=True
        return OrderedDict, (), None, None, iter(self.items())


# torch.compile would look into them, and trace what can only be run
for _method in (Group.__setitem__, Group.get, Group.setdefault, Group.update):
    leave_alone(_method)


def _schedule_at_work() -> str:
    """The class of the schedule of torch's that writes into a group; empty if none does."""
    # past `_taken`, what is around it, and `__setitem__`
    frame: FrameType | None = sys._getframe(4)
    while frame is not None and frame.f_globals is vars(torch_schedules):
        writer = frame.f_locals.get("self")
        if isinstance(writer, torch_schedules.LRScheduler):
            return type(writer).__name__
        frame = frame.f_back
    return ""


def check_waiting(groups: Iterable[Any]) -> None:
    """Check what schedules have left in the groups, where a rule reads them by itself.

    Raises:
        ValueError: a step cannot use it
    """
    for group in groups:
        if isinstance(group, Group):
            group.check_waiting()


def as_groups(params: Any, owner: str) -> list[Any]:
    """The constructor's `params` as a list of groups, which are yet to be checked."""
    if isinstance(params, (set, frozenset)):
        warnings.warn(
            f"{UNORDERED} This will be an error in a future release. ({owner})",
            FutureWarning,
            # past both constructors: the rule's and that of Optimizer
            stacklevel=4,
        )
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        remedy = "put it in a list" if isinstance(params, Tensor) else "pass model.parameters()"
        raise TypeError(
            "params argument given to the optimizer should be an iterable of Tensors or dicts, but "
            f"got {torch.typename(params)} ({owner}: {remedy})"
        )
    groups = list(params)
    if not groups:
        raise ValueError(
            f"optimizer got an empty parameter list ({owner}: a generator can be used only once, "
            "and a frozen model may have nothing to train)"
        )
    return groups if isinstance(groups[0], dict) else [{"params": groups}]


def add_group(
    given: Any,
    defaults: Mapping[str, Any],
    declaration: Declaration,
    groups: Sequence[Mapping[str, Any]],
) -> Group:
    """The group that joins `groups` when this dict is given; nothing is changed.

    Raises:
        TypeError, ValueError, KeyError, RuntimeError: it cannot
    """
    if not isinstance(given, dict):
        raise TypeError(
            f"param_group must be a dict, but got {type(given)} "
            f"({declaration.owner}, group {len(groups)})"
        )
    place = f"{declaration.owner}, group {len(groups)}"
    items = {**_multiplied(given, defaults, place), **params_of(given, place)}
    names = items.get("param_names")
    for i, param in enumerate(items["params"]):
        spelt = f"parameter {names[i] if names else i}"
        check_param(param, f"{place}, {spelt}", bool(defaults.get("differentiable")))
    items = declaration.complete(items, defaults, len(groups))
    if len(items["params"]) != len({id(param) for param in items["params"]}):
        warnings.warn(f"{DUPLICATES} ({place})", stacklevel=3)
    check_company(items, groups, place)
    return Group(items, declaration, len(groups))


def _multiplied(
    given: Mapping[str, Any], defaults: Mapping[str, Any], place: str
) -> dict[str, Any]:
    """The group with numbers in place of multiples."""
    items = dict(given)
    for key, value in given.items():
        if isinstance(value, Times):
            own = defaults.get(key)
            if isinstance(own, bool) or not isinstance(own, (int, float, Tensor)):
                raise TypeError(
                    f"{place}: {key} cannot be Times({value.factor:g}), since the optimizer has no "
                    f"number {key} of its own to multiply"
                )
            items[key] = value.of(own)
    return items


def params_of(group: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The keys "params" and, if there are names, "param_names"."""
    if "params" not in group:
        raise MissingKeyError(
            f"params ({place}: a group needs this key, it has {', '.join(map(str, group))})"
        )
    params = group["params"]
    if isinstance(params, (set, frozenset)):
        raise TypeError(f"{UNORDERED} ({place})")
    if not isinstance(params, Iterable):
        raise TypeError(
            "params argument given to the optimizer should be an iterable of Tensors or dicts, but "
            f"got {torch.typename(params)} ({place}: params must be parameters)"
        )
    items = [params] if isinstance(params, Tensor) else list(params)
    named = [item for item in items if isinstance(item, tuple)]
    if not named:
        names = group.get("param_names")
        if names is not None and not (
            isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        ):
            raise TypeError(f"{place}: param_names must be a list of str, got {names!r:.60}")
        if names is not None and len(names) != len(items):
            raise ValueError(
                "all optimizer params should be with/without names. Some param names are missing "
                f"({place}: {len(names)} param_names for {len(items)} params)"
            )
        return {"params": items}
    if len(named) < len(items):
        raise ValueError(
            "all optimizer params should be with/without names. Some param names are missing "
            f"({place}: {len(named)} of {len(items)} are named)"
        )
    for item in named:
        if len(item) != 2 or not isinstance(item[0], str):
            raise TypeError(f"{place}: a named parameter must be a (name, Tensor), got {item!r}")
    return {"params": [p for _, p in named], "param_names": [name for name, _ in named]}


def check_param(param: Any, place: str, differentiable: bool) -> None:
    """Refuse what is no Tensor, or was computed from others."""
    if not isinstance(param, Tensor):
        remedy = ""
        if isinstance(param, torch.nn.Module):
            remedy = ": pass its .parameters()"
        elif isinstance(param, str):
            remedy = ": of a dict, pass .values(), or .items() for names; put a group in a list"
        raise TypeError(
            f"optimizer can only optimize Tensors, but one of the params is "
            f"{torch.typename(param)} ({place}{remedy})"
        )
    if not (differentiable or param.is_leaf or param.retains_grad):
        raise ValueError(
            f"can't optimize a non-leaf Tensor ({place}: it was computed from others; optimize "
            "those, or .detach().requires_grad_() it)"
        )


def check_company(
    group: Mapping[str, Any], others: Sequence[Mapping[str, Any]], place: str
) -> None:
    for other in others:
        if ("param_names" in group) != ("param_names" in other):
            kind = "with names" if "param_names" in group else "without names"
            raise ValueError(
                "all optimizer param groups should be with/without names. cannot add param group "
                f"{kind} to the optimizer ({place})"
            )
    taken = {id(param): index for index, other in enumerate(others) for param in other["params"]}
    for i, param in enumerate(group["params"]):
        if id(param) in taken:
            names = group.get("param_names")
            raise ValueError(
                "some parameters appear in more than one parameter group "
                f"({place}: parameter {names[i] if names else i} is in group {taken[id(param)]})"
            )
