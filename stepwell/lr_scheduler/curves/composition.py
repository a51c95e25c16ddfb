"""What a curve is, and how curves are joined: `>>` is "then", `*` multiplies.

A curve is a pure function of the step. It says its value between its first and its last step; what
a negative step, or one beyond the end, means is said here, once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from numbers import Real
from typing import Any, ClassVar

from ...language.fields import Field, Range


@dataclass(frozen=True)
class Length(Field):
    """A number of steps, which others may know as a share of all steps."""

    def check(self, value: Any, owner: str, where: str = "") -> Any:
        """Return the value, as a number of Python's.

        Raises:
            ValueError: it is below one step
            TypeError: it is no number
        """
        try:
            return super().check(value, owner, where)
        except ValueError as error:
            if not (isinstance(value, (int, float)) and 0 < value < 1):
                raise
            hint = f"steps are counted, not a ratio: {owner}({self.name}={value} * total_steps)"
            raise ValueError(f"{error}; {hint}") from None


STEPS = Length("steps", None, "number", Range(1))
LASTING = replace(STEPS, optional=True)
TOTAL_ITERS = replace(STEPS, name="total_iters")
END = Field("end", 0.0, "number", Range(0))
ETA_MIN = replace(END, name="eta_min")
GAMMA = Field("gamma", None, "number", Range(0))


class Curve:
    """A number for each step, such as a factor of the learning rate.

    Two curves are equal if they are written alike, and their `repr` is an expression that makes
    them again. From its last step on, a curve keeps the value that it has there.

    A new curve is a frozen dataclass that lists in `checks` what its arguments may be, and says in
    `at` what its value is.

    Attributes:
        steps: how many steps it takes until what follows it begins; None: it has no end

    >>> from stepwell.lr_scheduler import cosine, linear
    >>> schedule = linear(0, 1, 4) >> cosine(10)
    >>> schedule(2), schedule(4), schedule(14), schedule(99)
    (0.5, 1.0, 0.0, 0.0)
    >>> schedule
    linear(0, 1, 4) >> cosine(10)
    """

    checks: ClassVar[tuple[Field, ...]] = ()
    steps: float | None

    def __post_init__(self) -> None:
        for check in self.checks:
            value = check.check(getattr(self, check.name), type(self).__name__)
            if check.kind in PLAIN and type(value) not in (int, float, type(None)):
                # so that the repr can be read back
                object.__setattr__(self, check.name, PLAIN[check.kind](value))

    def __call__(self, step: float) -> float:
        """The value at a step; the first is step 0.

        Raises:
            ValueError: the step is negative or not finite
        """
        if not 0 <= step < math.inf:
            raise ValueError(
                f"Invalid step value: {step} ({type(self).__name__}: step must be a number in "
                "[0, inf))"
            )
        return self.at(step if self.steps is None else min(step, self.steps))

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        raise NotImplementedError

    def __rshift__(self, after: Any) -> Curve:
        """This curve, then another one, whose step 0 is where this one ends."""
        if not isinstance(after, Curve):
            return NotImplemented
        return Then(_parts(self) + _parts(after))

    def __mul__(self, other: Any) -> Curve:
        """This curve times another one, or times a number."""
        if isinstance(other, Curve):
            return Product(self, other)
        if not isinstance(other, Real):
            return NotImplemented
        return Scaled(self, other)  # type: ignore[arg-type]  # it becomes a float

    def __rmul__(self, factor: float) -> Curve:
        return self * factor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._arguments())})"

    def _arguments(self) -> list[str]:
        shown = []
        for argument in fields(self):  # type: ignore[arg-type]
            value = getattr(self, argument.name)
            if argument.default is MISSING:
                shown.append(repr(value))
            elif value != argument.default:
                shown.append(f"{argument.name}={value!r}")
        return shown


PLAIN: dict[str, Any] = {"number": float, "integer": int}


@dataclass(frozen=True, repr=False)
class Then(Curve):
    """Curves one after the other.

        value(t) = part k (t - start k), where start k <= t < start k + 1

    Raises:
        ValueError: a curve that has no end is followed by another one
    """

    parts: tuple[Curve, ...]
    starts: tuple[float, ...] = field(init=False, compare=False)
    steps: float | None = field(init=False, compare=False)

    def __post_init__(self) -> None:
        starts: list[float] = [0]
        for part, after in zip(self.parts, self.parts[1:], strict=False):
            if part.steps is None:
                raise ValueError(
                    f"{part} >> {after}: the first has no end; give it its number of steps, "
                    "steps=..."
                )
            starts.append(starts[-1] + part.steps)
        last = self.parts[-1].steps
        object.__setattr__(self, "starts", tuple(starts))
        object.__setattr__(self, "steps", None if last is None else starts[-1] + last)

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        index = active(self.starts, step)
        return self.parts[index](step - self.starts[index])

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.parts))


@dataclass(frozen=True, repr=False)
class Product(Curve):
    """Two curves multiplied; it has an end, the later one, if both have."""

    left: Curve
    right: Curve
    steps: float | None = field(init=False, compare=False)

    def __post_init__(self) -> None:
        ends = [self.left.steps, self.right.steps]
        object.__setattr__(self, "steps", None if None in ends else max(e or 0 for e in ends))

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        return self.left(step) * self.right(step)

    def __repr__(self) -> str:
        right = f"({self.right})" if isinstance(self.right, (Product, Scaled)) else None
        return f"{_factor(self.left)} * {right or _factor(self.right)}"


@dataclass(frozen=True, repr=False)
class Scaled(Curve):
    """A curve times a number."""

    curve: Curve
    factor: float
    steps: float | None = field(init=False, compare=False)

    checks = (Field("factor", None, "number", Range(0)),)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "steps", self.curve.steps)

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        return self.curve(step) * self.factor

    def __repr__(self) -> str:
        return f"{_factor(self.curve)} * {self.factor!r}"


def _parts(curve: Curve) -> tuple[Curve, ...]:
    return curve.parts if isinstance(curve, Then) else (curve,)


def _factor(curve: Curve) -> str:
    return f"({curve})" if isinstance(curve, Then) else repr(curve)


def active(starts: Sequence[float], step: float) -> int:
    """Which of several parts holds at a step, given the steps at which they start, the first at 0.

    Where parts start together, the last of them does.
    """
    return bisect_right(starts, step) - 1


def whole(number: Any) -> Any:
    """A whole number for a float that is one, as 0.5 * epochs often is; anything else as it is."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def blend(start: float, end: float, share: float) -> float:
    """From `start` to `end`, both exact, as the share goes from 0 to 1."""
    return start * (1.0 - share) + end * share


def wave(share: float) -> float:
    """The half wave of a cosine, from 1 down to 0 as the share goes from 0 to 1."""
    return (1.0 + math.cos(math.pi * share)) / 2.0


def power(base: float, exponent: float) -> float:
    """`base ** exponent`, infinite where it is too large for a number."""
    try:
        return math.pow(base, exponent)
    except OverflowError:
        return math.inf if base > 1 else float(base == 1)
