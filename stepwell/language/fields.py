"""What a rule declares: its hyperparameters with their ranges, and its state.

    lr: NonNegative = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    momentum: Switch = 0
    exp_avg = zeros()

Everything that is ever checked about a hyperparameter is checked here.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import re
import types
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, replace
from functools import cached_property, partial
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    SupportsFloat,
    Union,
    get_args,
    get_origin,
)

import numpy as np
import torch
from torch import Tensor

from .number import is_fake

__all__ = [
    "Decay",
    "Field",
    "MissingKeyError",
    "NonNegative",
    "OwnFlag",
    "Positive",
    "Range",
    "Real",
    "Slot",
    "Switch",
    "Unlisted",
    "count",
    "fixed",
    "full",
    "near_miss",
    "unset",
    "zeros",
]


class MissingKeyError(KeyError):
    """A KeyError that prints its words as they are; any other prints them in quotes."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Range:
    """The numbers from low to high; `open` names the ends that do not belong: "(", ")", "()".

    Infinity belongs only if the range is `endless`, for a number whose infinity means "always".
    """

    low: float = -math.inf
    high: float = math.inf
    open: str = ""
    endless: bool = False

    def __contains__(self, value: SupportsFloat) -> bool:
        try:
            number = float(value)
        except OverflowError:
            return False
        # written so that NaN fails
        above = self.low < number if "(" in self.open else self.low <= number
        below = number < self.high if ")" in self.open else number <= self.high
        return above and below and (self.endless or not math.isinf(number))

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest float that belong to it."""
        first, last = math.nextafter(self.low, math.inf), math.nextafter(self.high, -math.inf)
        low = first if self._is_open("(", self.low) else self.low
        high = last if self._is_open(")", self.high) else self.high
        return low, high

    def _is_open(self, bracket: str, end: float) -> bool:
        return bracket in self.open or (math.isinf(end) and not self.endless)

    def __str__(self) -> str:
        left = "(" if self._is_open("(", self.low) else "["
        right = ")" if self._is_open(")", self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


class ZeroIsOff:
    """Marks a number for which zero means "off", so that a formula may branch on it."""


@dataclass(frozen=True)
class Message:
    """The words with which a refusal of this hyperparameter begins; {value} is filled in, and for
    one number of several also {index} and all {values}."""

    text: str


@dataclass(frozen=True)
class AtFirst:
    """The range of what a constructor takes, where groups may go further: a rate that ends at 0."""

    range: Range


@dataclass(frozen=True)
class Unlisted:
    """Marks a hyperparameter that torch's class of this name lacks: at its default it is no key of
    a group, so that what torch saved has all the keys that torch.distributed.checkpoint asks for.
    """


# every number may be a Tensor of one element, so that type checkers let it through
NonNegative = Annotated[float | Tensor, Range(0)]
Positive = Annotated[float | Tensor, Range(0, open="(")]
Decay = Annotated[float | Tensor, Range(0, 1, open=")")]
Share = Annotated[float | Tensor, Range(0, 1)]
Real = Annotated[float | Tensor, Range()]
OwnFlag = Annotated[bool | None, Unlisted()]
"""True, False or None, of a rule that has no such flag in torch."""
Switch = Annotated[float | Tensor, Range(0), ZeroIsOff()]
"""A number >= 0 for which zero means "off": the formula may say `if group.momentum:`."""

# How torch names some hyperparameters in its messages; the others go by their own name.
SPOKEN = {
    "lr": "learning rate: {value}",
    "eps": "epsilon value: {value}",
    "betas": "beta parameter at index {index}: {value}",
}


def plain_number(value: Any) -> Any:
    """A number of numpy, or another real number, as Python's own; anything else as it is.

    `torch.load` refuses files with any other, unless it may run their code.
    """
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if type(value) in (int, float, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


ROUNDING = 1e-12
"""How far past the end of its range a computed number may lie, relative to 1 or to the end."""


@dataclass(frozen=True)
class Field:
    """One hyperparameter: its name, default, and the values it takes.

    `kind` is "number", "integer" (a static number), "flag", "choice" or "tuple"; a tuple has one
    Field per item. One that is `fixed` is in every group, but no argument of the constructor. One
    that is `unlisted` is in a group only where it differs from its default.
    """

    name: str
    default: Any
    kind: str
    range: Range | None = None
    zero_is_off: bool = False
    optional: bool = False
    choices: tuple[Any, ...] = ()
    items: tuple[Field, ...] = ()
    spoken: str | None = None
    keyword_only: bool = False
    fixed: bool = False
    first_range: Range | None = None
    unlisted: bool = False

    @property
    def at_first(self) -> Field:
        """The hyperparameter as a constructor takes it."""
        return self if self.first_range is None else replace(self, range=self.first_range)

    @property
    def allowed(self) -> str:
        """The values it takes, in words."""
        if self.items:
            return "(" + ", ".join(item.allowed for item in self.items) + ")"
        none = " or None" if self.optional else ""
        if self.kind == "flag":
            return f"True, False{none}" if none else "True or False"
        if self.kind == "choice":
            return "one of " + ", ".join(repr(choice) for choice in self.choices) + none
        return f"in {self.range}{none}"

    @cached_property
    def _ends(self) -> list[tuple[float, float]]:
        """The smallest and the largest float of each item that is a number."""
        return [item.range.ends for item in self.items if item.kind == "number" and item.range]

    def admits(self, values: Sequence[Any]) -> bool:
        """Whether all of these are plain floats in range: quick, and never wrongly True.

        Where it says False, `check` says what is right.
        """
        if self.kind != "number" or self.range is None or set(map(type, values)) != {float}:
            return False
        # a NaN among them, which min and max may miss, makes the sum NaN
        is_finite = math.isfinite(sum(values))
        return is_finite and min(values) in self.range and max(values) in self.range

    def settled(self, value: Any) -> Any:
        """The number at the end of the range, for one that rounding took past it.

        torch's chained schedules multiply a rate step by step, and end a descent to 0 at -1e-20.
        """
        if self.kind != "number" or type(value) is not float or self.range is None:
            return value
        if value not in self.range:
            for end in filter(math.isfinite, (self.range.low, self.range.high)):
                if end in self.range and abs(value - end) <= ROUNDING * max(1.0, abs(end)):
                    return float(end)
        return value

    def check(self, value: Any, owner: str, where: str = "") -> Any:
        """Return the value if this hyperparameter can take it; a number of numpy as one of Python.

        Raises:
            ValueError: it is out of range, or a tuple of the wrong length
            TypeError: it is no number, flag or choice at all
        """
        place = f"{owner}, {where}" if where else owner
        if self.items:
            return self._check_items(value, place)
        if self.kind == "flag" and isinstance(value, (int, np.bool_)) and value in (0, 1):
            return bool(value)
        return self._check_number(value, place, self.name, 0)

    def _check_number(
        self, value: Any, place: str, spelt: str, index: int, among: Sequence[Any] = ()
    ) -> Any:
        value = plain_number(value)
        if isinstance(value, Tensor) and value.numel() != 1:
            shape = tuple(value.shape)
            raise ValueError(f"Tensor {spelt} must be 1-element ({place}: got shape {shape})")
        problem = self._problem(value)
        if problem is not None:
            raise problem(self._refusal(value, place, index, among))
        return value

    def _refusal(self, value: Any, place: str, index: int, among: Sequence[Any]) -> str:
        text = self.spoken or SPOKEN.get(self.name) or f"{self.name} value: {{value}}"
        text = text if self.spoken else f"Invalid {text}"
        shown = value.item() if isinstance(value, Tensor) else value
        shown = repr(shown) if isinstance(shown, str) and self.kind != "choice" else shown
        kind = {"number": "a number ", "integer": "a whole number "}.get(self.kind, "")
        said = text.format(value=shown, index=index, values=", ".join(map(str, among)))
        # it may look like a number
        is_plain = value is None or isinstance(value, (str, bool, int, float, Tensor))
        found = "" if is_plain else f", got {torch.typename(value)}"
        return f"{said} ({place}: {self.name} must be {kind}{self.allowed}{found})"

    def _problem(self, value: Any) -> type[Exception] | None:
        if value is None and self.optional:
            return None
        if self.kind == "flag":
            return None if isinstance(value, bool) else TypeError
        if self.kind == "choice":
            is_plain = value is None or isinstance(value, (str, int))
            return None if is_plain and value in self.choices else ValueError
        if self.kind == "integer":
            return self._integer_problem(value)
        assert self.range is not None
        if isinstance(value, Tensor):
            return self._tensor_problem(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return TypeError
        return None if value in self.range else ValueError

    def _integer_problem(self, value: Any) -> type[Exception] | None:
        assert self.range is not None
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            return TypeError
        return None if value in self.range else ValueError

    def _tensor_problem(self, value: Tensor) -> type[Exception] | None:
        # looking at a number on an accelerator would wait for it
        if value.device.type != "cpu" or is_fake(value):
            return None
        assert self.range is not None
        if value.is_complex() or value.dtype is torch.bool:
            return TypeError
        return None if value.item() in self.range else ValueError

    def static(self, value: Any) -> Any:
        """What a formula may branch on: the value of a flag or choice, for a number whether it is
        None, and whether it is zero where zero means off. `...` stands for a number."""
        if self.items:
            return tuple(item.static(v) for item, v in zip(self.items, value, strict=True))
        if self.kind != "number" or value is None:
            return value
        if isinstance(value, Tensor) and value.device.type != "cpu":
            # a look at it would wait
            return ...
        return 0 if self.zero_is_off and value == 0 else ...

    def _check_items(self, value: Any, place: str) -> tuple[Any, ...]:
        if type(value) is tuple and len(value) == len(self.items) == len(self._ends):
            pairs = zip(self._ends, value, strict=True)
            # what torch's schedules write at every step
            if all(type(v) is float and low <= v <= high for (low, high), v in pairs):
                return value
        value = list(value) if isinstance(value, np.ndarray) and value.ndim == 1 else value
        if isinstance(value, (str, Mapping, Tensor)) or not isinstance(value, Sequence):
            raise TypeError(
                f"Invalid {self.name}: {value!r} ({place}: {self.name} must be a tuple "
                f"{self.allowed})"
            )
        if len(value) != len(self.items):
            raise ValueError(
                f"Invalid {self.name}: {tuple(value)} ({place}: {self.name} must be "
                f"{len(self.items)} numbers {self.allowed})"
            )
        if len({isinstance(v, Tensor) for v in value}) > 1:
            raise ValueError(f"{self.name} must be either both floats or both Tensors ({place})")
        numbered = enumerate(zip(self.items, value, strict=True))
        return tuple(
            item._check_number(v, place, f"{self.name}[{i}]", i, value) for i, (item, v) in numbered
        )


@dataclass(frozen=True)
class Slot:
    """One entry of a parameter's state.

    `initial` is a number, the name of a hyperparameter, "param" for a copy of the parameter, or
    None: then the formula reads None until it has assigned a value. `when` names the flag or
    switch without which the entry does not exist. A `scalar` is one number per parameter; `over`
    is the dimension that is kept with size 1, where the entry is smaller than the parameter. A
    `wide` entry is kept in the precision of the arithmetic: float32 for half precision. What a
    transform has `added` to a rule starts anew where a checkpoint of the rule alone is loaded.
    """

    initial: float | str | None
    when: str | None = None
    scalar: bool = False
    over: int | None = None
    wide: bool = False
    added: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the entry has one number per element."""
        return not self.scalar and self.over is None


def zeros(*, when: str | None = None, scalar: bool = False, over: int | None = None) -> Any:
    """State that starts at zero, shaped like the parameter."""
    return Slot(0.0, when, scalar, over)


def full(
    value: float | str,
    *,
    when: str | None = None,
    scalar: bool = False,
    over: int | None = None,
    wide: bool = False,
) -> Any:
    """State that starts at a number, at a hyperparameter (its name), or as a copy of "param"."""
    return Slot(value, when, scalar, over, wide)


def count() -> Any:
    """`step = count()`: the steps are counted, although the formula does not look at the count."""
    return Slot(0.0, scalar=True)


def unset(*, when: str | None = None) -> Any:
    """State that reads as None until the formula has assigned it, as SGD's momentum_buffer."""
    return Slot(None, when)


@dataclass(frozen=True)
class Fixed:
    """A hyperparameter that the rule has settled."""

    value: bool | str | int


def fixed(value: bool | str | int) -> Any:
    """A hyperparameter with one value: every group carries it, the constructor does not take it."""
    return Fixed(value)


def fields_of(cls: type, known: Container[str] | None = None) -> dict[str, Field]:
    """The hyperparameters that the body of `cls` declares, in order; of those `known`, if given."""
    fields: dict[str, Field] = {}
    keyword_only = False
    for name, hint in _annotations(cls).items():
        if hint is KW_ONLY:
            keyword_only = True
        elif (
            name.startswith("_")
            or isinstance(hint, InitVar)
            or get_origin(hint) is ClassVar
            or hint is ClassVar
            or (known is not None and name not in known)
        ):
            continue
        elif name not in cls.__dict__:
            raise TypeError(f"{cls.__name__}.{name}: a hyperparameter needs a default")
        else:
            field = _field(cls.__name__, name, hint, cls.__dict__[name])
            fields[name] = replace(field, keyword_only=keyword_only)
    for name, value in vars(cls).items():
        if isinstance(value, Fixed):
            choices = (value.value,)
            fields[name] = Field(name, value.value, "choice", choices=choices, fixed=True)
    for field in fields.values():
        field.check(field.default, cls.__name__, "default")
    return fields


def _annotations(cls: type) -> dict[str, Any]:
    try:
        return inspect.get_annotations(cls, eval_str=True)
    except NameError as error:
        raise TypeError(
            f"{cls.__name__}: an annotation cannot be read: {error}; import the name at the top of "
            "the module, where `from __future__ import annotations` can find it"
        ) from error


def slots_of(cls: type) -> dict[str, Slot]:
    """The state that the body of `cls` declares, in order."""
    return {name: value for name, value in vars(cls).items() if isinstance(value, Slot)}


def _field(owner: str, name: str, hint: Any, default: Any) -> Field:
    metadata: list[Any] = []
    kinds = _alternatives(hint, metadata)
    optional = type(None) in kinds
    # a Tensor of one element is taken wherever a number is
    kinds = [kind for kind in kinds if kind not in (type(None), Tensor)]
    hint = kinds[0] if len(kinds) == 1 else hint
    spoken = next((m.text for m in metadata if isinstance(m, Message)), None)
    first = next((m.range for m in metadata if isinstance(m, AtFirst)), None)
    unlisted = any(isinstance(m, Unlisted) for m in metadata)
    known = partial(
        Field, name, default, optional=optional, spoken=spoken, first_range=first, unlisted=unlisted
    )
    if hint is bool:
        return known("flag")
    if get_origin(hint) is Literal:
        return known("choice", choices=get_args(hint))
    if get_origin(hint) is tuple:
        defaults = default if isinstance(default, tuple) else (default,) * len(get_args(hint))
        items = tuple(
            _field(owner, name, arg, d) for arg, d in zip(get_args(hint), defaults, strict=True)
        )
        return known("tuple", items=items)
    if hint in (float, int):
        bounds = next((m for m in metadata if isinstance(m, Range)), Range())
        off = any(isinstance(m, ZeroIsOff) or m is ZeroIsOff for m in metadata)
        return known("number" if hint is float else "integer", range=bounds, zero_is_off=off)
    raise TypeError(
        f"{owner}.{name}: a hyperparameter is a float (best with a range: NonNegative, Decay), "
        f"a tuple of these, a bool, an int or a Literal, got {hint}"
    )


def _alternatives(hint: Any, metadata: list[Any]) -> list[Any]:
    """The types that a hint allows, with what is annotated to them gathered in `metadata`."""
    if get_origin(hint) is Annotated:
        metadata += hint.__metadata__
        return _alternatives(hint.__origin__, metadata)
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for arg in get_args(hint) for kind in _alternatives(arg, metadata)]
    return [hint]


# what torch's schedulers write into groups
SCHEDULED = frozenset({"initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum"})


DOUBLED = re.compile(r"(.)\1+")
# what other libraries call them
SPELT_OUT = {"learningrate": "lr", "epsilon": "eps"}


def _is_longer(key: str, name: str) -> bool:
    rest = key.removeprefix(name)
    return rest != key and (rest.startswith("_") or rest.isdigit())


def near_miss(key: str, names: Iterable[str]) -> str | None:
    """The name that `key` is a misspelling of, if it looks like one."""
    plain = {name.replace("_", ""): name for name in names}
    # `_lr` is private to somebody, and `eps1` or `lr_scale` means something beside `eps` or `lr`
    beside = key.startswith("_") or any(_is_longer(key, name) for name in plain.values())
    if key in SCHEDULED or beside or key in plain.values():
        return None
    meant = key.lower().replace("-", "").replace("_", "")
    # short names leave no room for a share of letters: a letter typed twice is one
    single = {DOUBLED.sub(r"\1", name): plain[name] for name in plain}
    meant = DOUBLED.sub(r"\1", SPELT_OUT.get(meant, meant))
    close = difflib.get_close_matches(meant, single, n=1, cutoff=0.85)
    return single[close[0]] if close else None
