"""Declarations: what the body of an optimizer class says, as constructor, checks and formula."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field, replace
from functools import cached_property
from types import GenericAlias
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.optim.optimizer import ParamsT, required
from typing_extensions import dataclass_transform

from .language import Formula, Maximize, Unscale, compose
from .language.fields import Field, Slot, count, fields_of, near_miss, plain_number, slots_of

__all__ = ["Declaration", "Flags", "copied", "declare", "tensors_in"]

OWN_KEYS = ("params", "param_names")


@dataclass(frozen=True, eq=False)
class Declaration:
    """What one optimizer class declares.

    Attributes:
        owner: its name
        fields: the hyperparameters of its groups
        check: what is wrong with hyperparameters that depend on each other, or None
        rule_fields: the hyperparameters without those of transforms
        slots: the state of its rule
    """

    owner: str
    fields: Mapping[str, Field]
    check: Callable[[Mapping[str, Any]], str | None]
    rule_fields: Mapping[str, Field]
    slots: Mapping[str, Slot]
    _foreign: dict[object, str | None] = field(default_factory=dict)

    @cached_property
    def ends(self) -> dict[str, tuple[float, float]]:
        """The smallest and the largest float that a group may hold of each number."""
        fields = self.fields.items()
        return {name: f.range.ends for name, f in fields if f.kind == "number" and f.range}

    @cached_property
    def unlisted(self) -> dict[str, Any]:
        """The defaults of hyperparameters that a group holds only where they differ from them."""
        return {name: f.default for name, f in self.fields.items() if f.unlisted}

    def listed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The group without what is unlisted and at its default."""
        unlisted = self.unlisted
        return {k: v for k, v in group.items() if not (k in unlisted and v == unlisted[k])}

    @property
    def arguments(self) -> list[Field]:
        """What the constructor takes after `params`, in order."""
        taken = [f for f in self.fields.values() if not f.fixed]
        return sorted(taken, key=lambda f: f.keyword_only)

    def signature(self) -> inspect.Signature:
        """The signature of `__init__`."""
        kind = inspect.Parameter
        either = kind.POSITIONAL_OR_KEYWORD
        parameters = [
            kind("self", either),
            kind("params", either, annotation=ParamsT),
            *(
                kind(
                    f.name,
                    kind.KEYWORD_ONLY if f.keyword_only else either,
                    default=f.default,
                    annotation=_annotation(f),
                )
                for f in self.arguments
            ),
        ]
        return inspect.Signature(parameters, return_annotation=None)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The value of each hyperparameter, given the constructor's arguments after `params`.

        Raises:
            TypeError: these arguments do not fit the signature
            ValueError, TypeError: a value is out of range, or no number at all
        """
        positional = [f.name for f in self.arguments if not f.keyword_only]
        if len(args) > len(positional):
            raise TypeError(
                f"{self.owner}.__init__() takes from 2 to {len(positional) + 2} positional "
                f"arguments but {len(args) + 2} were given"
            )
        given = dict(zip(positional, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise TypeError(
                    f"{self.owner}.__init__() got multiple values for argument '{name}'"
                )
            if name not in self.fields or self.fields[name].fixed:
                raise TypeError(self._unexpected(name))
            given[name] = value
        bound = {
            name: f.at_first.check(given.get(name, f.default), self.owner)
            for name, f in self.fields.items()
        }
        problem = self.check({**bound, "params": []})
        if problem is not None:
            raise ValueError(f"{problem} ({self.owner})")
        return bound

    def _unexpected(self, name: str) -> str:
        names = [f.name for f in self.arguments]
        close = near_miss(name, names)
        hint = f"did you mean '{close}'?" if close else f"it takes params, {', '.join(names)}"
        return f"{self.owner}.__init__() got an unexpected keyword argument '{name}'; {hint}"

    def checked(self, key: str, value: Any, index: int) -> Any:
        """The value that a group may hold under this key; any value under a foreign one."""
        place = f"group {index}"
        if key in self.fields:
            field = self.fields[key]
            return field.check(field.settled(value), self.owner, place)
        close = self._meant_by(key)
        if close is not None:
            raise ValueError(
                f"{self.owner}, {place}: key '{key}' is no hyperparameter; did you mean '{close}'? "
                "(keys unlike any hyperparameter are kept as they are)"
            )
        return plain_number(value) if isinstance(value, np.generic) else value

    def _meant_by(self, key: object) -> str | None:
        if key not in self._foreign:
            names = (*self.fields, *OWN_KEYS)
            meant = near_miss(key, names) if self.fields and isinstance(key, str) else None
            self._foreign[key] = meant
        return self._foreign[key]

    def complete(
        self, group: Mapping[str, Any], defaults: Mapping[str, Any], index: int
    ) -> dict[str, Any]:
        """The group with all its hyperparameters, each of them checked; it shares no default."""
        for name, default in defaults.items():
            if default is required and name not in group:
                raise ValueError(
                    "parameter group didn't specify a value of required optimization parameter "
                    f"{name} ({self.owner}, group {index})"
                )
        known = {name: f.default for name, f in self.fields.items()}
        # as torch does: the group's own keys first, then the defaults
        rest = {**known, **defaults}
        full = {**group, **{k: copied(v) for k, v in rest.items() if k not in group}}
        full = {key: self.checked(key, value, index) for key, value in full.items()}
        self._check_together(full, index)
        return full

    def _check_together(self, group: Mapping[str, Any], index: int) -> None:
        place = f"({self.owner}, group {index})"
        if self.fields and group.get("fused"):
            if group.get("differentiable"):
                raise RuntimeError(f"`fused` does not support `differentiable` {place}")
            if group.get("foreach"):
                raise RuntimeError(f"`fused` and `foreach` cannot be `True` together. {place}")
        problem = self.check(group)
        if problem is not None:
            raise ValueError(f"{problem} {place}")


def copied(default: Any) -> Any:
    """The default as another may hold it, who fills Tensors in place; what has a gradient stays."""
    if isinstance(default, Tensor):
        return default if default.requires_grad else default.detach().clone()
    return tuple(map(copied, default)) if type(default) is tuple else default


def tensors_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """The Tensors among these values, and the tuples that have some."""
    return {
        key: value
        for key, value in values.items()
        if any(isinstance(v, Tensor) for v in (value if type(value) is tuple else (value,)))
    }


def _annotation(field: Field) -> Any:
    hint: Any = {"flag": bool, "integer": int}.get(field.kind, float | Tensor)
    if field.kind == "choice":
        hint = Literal.__getitem__(field.choices)
    if field.items:
        hint = GenericAlias(tuple, tuple(_annotation(item) for item in field.items))
    return hint | None if field.optional else hint


@dataclass_transform()
class Declared:
    """Tells type checkers that the annotations of a subclass are its constructor's arguments."""


class Flags(Declared):
    """What every constructor takes: parameters, and by keyword the flags that a rule lacks."""

    params: InitVar[ParamsT]
    _: KW_ONLY
    maximize: bool = False
    foreach: bool | None = None
    capturable: bool = False
    differentiable: bool = False
    fused: bool | None = None


def _take_fields(cls: type, known: Container[str] | None = None) -> dict[str, Field]:
    """The hyperparameters that the body of a class declares, which then are no attributes of it.

    An optimizer's rate is in its groups; `optimizer.lr` would answer with the default.
    """
    fields = fields_of(cls, known)
    for name in fields:
        delattr(cls, name)
    return fields


FLAGS = _take_fields(Flags)


# what formulas and groups call something else
TAKEN = {"param", "grad", "params", "param_names", "state", "param_groups", "defaults", "update"}


def declare(cls: Any, base: type) -> None:
    """Read the body of a subclass of `base`; make its declaration, formula and constructor.

    Raises:
        TypeError: it declares what cannot be
    """
    above: Declaration = super(cls, cls).declaration
    body = vars(cls)
    slots = slots_of(cls)
    # a rule is a formula, or a step of its own
    is_rule = "update" in body or "_make_plan" in body
    # a class without a formula may give a hyperparameter another default, or annotate what it likes
    known = above.rule_fields.keys()
    reads = is_rule or "__init__" not in body
    fields = _take_fields(cls, None if is_rule else known) if reads else {}
    for name in (*fields, *slots):
        if name == "step" and slots.get(name) == count():
            # the method is the shell's, the entry of the state is the rule's
            continue
        if hasattr(base, name) or name in TAKEN:
            raise TypeError(f"{cls.__name__}.{name}: the shell uses this name, choose another")
    for name in slots:
        delattr(cls, name)
    changed = bool(is_rule or fields or slots or "transforms" in body)
    fields = {**above.rule_fields, **fields}
    if "update" in body and not fields.keys() & FLAGS.keys():
        fields |= FLAGS
    added = {n: replace(f, keyword_only=True) for t in cls.transforms for n, f in t.fields.items()}
    slots = {**above.slots, **slots}
    cls.declaration = Declaration(cls.__name__, {**fields, **added}, cls.check, fields, slots)
    if changed and hasattr(cls, "update"):
        cls.formula = _formula(cls)
    if changed and "__init__" not in body:
        cls.__init__ = _constructor(cls)


def _formula(cls: Any) -> Formula:
    taken = list(inspect.signature(cls.update).parameters)
    if len(taken) != 4:
        raise TypeError(
            f"{cls.__name__}.update must be a static method of (param, grad, state, group), "
            f"got ({', '.join(taken)})"
        )
    for name, slot in cls.declaration.slots.items():
        if cls.sparse_only and (slot.initial is None or slot.over is not None):
            raise TypeError(
                f"{cls.__name__}.{name}: with sparse_only=True, state has a number for each "
                "element from the start: zeros() or full()"
            )
    fields = cls.declaration.rule_fields
    rule = Formula(cls.__name__, fields, cls.declaration.slots, cls.update)
    climb = [Maximize] if "maximize" in fields else []
    return compose(rule, [Unscale, *climb, *cls.transforms])


def _constructor(cls: Any) -> Callable[..., None]:
    """An `__init__` that shows the signature; what it says is done by the base class."""

    def __init__(self: Any, params: ParamsT, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        super(cls, self).__init__(params, *args, **kwargs)

    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    __init__.__module__ = cls.__module__
    __init__.__signature__ = cls.declaration.signature()  # type: ignore[attr-defined]
    return __init__
