"""Hyperparameters: the numbers of all groups as a table, read afresh at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .language import Formula
from .language.fields import MissingKeyError
from .language.number import is_fake

__all__ = ["Checked", "Hyperparameters", "columns_of", "is_elsewhere"]


def is_elsewhere(value: Any) -> bool:
    """Return whether reading this number would wait for a device, or is impossible."""
    return isinstance(value, Tensor) and (value.device.type != "cpu" or is_fake(value))


class Checked(dict[str, Any]):
    """A group that has checked what was written to it; any other is checked as it is read.

    Attributes:
        waiting: who has written a value that is yet to be checked, by the step that would use it
    """

    __slots__ = ("waiting",)

    waiting: str


def columns_of(formula: Formula) -> list[str]:
    """The numbers among the hyperparameters, `betas.0` for the first of `betas`."""
    return [
        f"{f.name}.{i}" if f.items else f.name
        for f in formula.fields.values()
        for i in range(len(f.items) or 1)
        if f.kind in ("number", "tuple")
    ]


class Hyperparameters:
    """The numbers of all groups: a row of float64 per group, a column per number of the formula.

    Groups are read afresh at every `refresh`; a number that is a tensor is looked at each time.

    Attributes:
        table: the numbers; NaN for what was left on a device
        on_device: the tensors that were left there, by row and column
    """

    def __init__(self, formula: Formula, groups: list[dict[str, Any]]) -> None:
        self.formula = formula
        self.groups = groups
        # an unlisted key that no group has is not looked for: a group that gets it has one key more
        self.names = [
            name
            for name, field in formula.fields.items()
            if name != "grad_scale" and not (field.unlisted and all(name not in g for g in groups))
        ]
        self._read: Callable[[Any], tuple[Any, ...]] = itemgetter(*self.names, self.names[0])
        if not all(name in group for group in groups for name in self.names):
            self._read = self._read_each
        self.columns = columns_of(formula)
        self.table: npt.NDArray[np.float64] = np.full((len(groups), len(self.columns)), np.nan)
        self.on_device: dict[tuple[int, int], Tensor] = {}
        self._seen: list[Any] = [None] * len(groups)
        self._static: list[Any] = [None] * len(groups)
        self._scale: Any = None
        self._waits = False

    def refresh(self, grad_scale: Any, *, waits: bool) -> bool:
        """Read all groups; False if a fact that a formula may branch on has changed.

        Unless it `waits`, numbers on a device are left there.
        """
        if waits and grad_scale is not None:
            grad_scale = _known(grad_scale)
        if waits is not self._waits or (
            grad_scale is not self._scale and _differ(grad_scale, self._scale)
        ):
            self._scale, self._waits = grad_scale, waits
            self._seen = [None] * len(self.groups)
        found = list(map(self._read, self.groups))
        if found == self._seen:
            return True
        changed = [index for index, values in enumerate(found) if values != self._seen[index]]
        stored = [self._store(index, found[index]) for index in changed]
        return all(stored)

    def _read_each(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        fields = self.formula.fields
        lacking = [name for name in self.names if name not in group and not fields[name].unlisted]
        if lacking:
            index = next(i for i, own in enumerate(self.groups) if own is group)
            raise MissingKeyError(
                f"{lacking[0]!r} ({self.formula.name}, group {index}: the step needs this key, "
                "which was taken out of the group)"
            )
        return tuple(group.get(name, fields[name].default) for name in self.names)

    def has_some_elsewhere(self) -> bool:
        """Whether a number is a tensor on a device."""
        return any(static is not None and static[1] for static in self._static)

    def _store(self, index: int, values: tuple[Any, ...]) -> bool:
        group = dict(zip(self.names, values, strict=False), grad_scale=self._scale)
        row: list[float] = []
        own = self.groups[index]
        if not isinstance(own, Checked) or own.waiting:
            where = f"group {index}{own.waiting if isinstance(own, Checked) else ''}"
            for name in self.names:
                self.formula.fields[name].check(group[name], self.formula.name, where)
        has_tensor = has_elsewhere = False
        for f in self.formula.fields.values():
            if f.kind in ("number", "tuple"):
                value = group[f.name]
                numbers = value if f.items else (value,)
                if any(isinstance(v, Tensor) for v in numbers):
                    # it may have been changed in place, where nothing could look at it
                    has_tensor = True
                    if self._waits or not any(map(is_elsewhere, numbers)):
                        f.check(value, self.formula.name, f"group {index}")
                for v in numbers:
                    has_elsewhere |= is_elsewhere(v) and f.name != "grad_scale"
                    row.append(self._number(v, index, len(row), f.name))
        self.table[index] = row
        static = self.formula.static(group), has_elsewhere
        same = self._static[index] is None or self._static[index] == static
        self._static[index] = static
        # a tensor can change in place, behind an equal list
        self._seen[index] = None if has_tensor else values
        return same

    def _number(self, value: Any, index: int, column: int, name: str) -> float:
        self.on_device.pop((index, column), None)
        if value is None:
            return math.nan
        if is_elsewhere(value) and not self._waits:
            if name != "grad_scale":
                self.on_device[index, column] = value
            return math.nan
        return _known(value)


def _known(value: Any) -> float:
    """A number, waited for; NaN where there is none."""
    if not isinstance(value, Tensor):
        return float(value)
    # item() because float() warns of a number that autograd follows
    return math.nan if is_fake(value) else float(value.item())


def _differ(a: Any, b: Any) -> bool:
    """Whether these are two numbers; for a tensor that would have to be waited for, two tensors."""
    if is_elsewhere(a) or is_elsewhere(b):
        return a is not b
    return bool(a != b)
