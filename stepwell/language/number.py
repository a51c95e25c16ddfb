"""Number: a float64 that is worked with as compiled code does it, where Python would raise."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

__all__ = ["Followed", "Number", "added", "divide", "exponential", "is_fake", "is_number", "power"]


def is_fake(value: Tensor) -> bool:
    """Return whether a tensor has no numbers, only a shape and a dtype."""
    # torch loads its class with the mode that makes them
    return value.is_meta or type(value).__name__ == "FakeTensor"


def is_number(value: Any) -> bool:
    """Return whether a value is a real number, or a Tensor of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def divide(a: float, b: float) -> float:
    """a / b; infinite, or NaN for 0 / 0, where b is zero."""
    if b:
        return a / b
    return math.copysign(math.inf, a) * math.copysign(1.0, b) if a and a == a else math.nan


def power(a: float, b: float) -> float:
    """a to the power b; infinite where it is too large, NaN where it would be complex."""
    try:
        return math.pow(a, b)
    except OverflowError:
        return -math.inf if a < 0 and b % 2 == 1 else math.inf
    except ValueError:
        return math.inf if a == 0 else math.nan


def exponential(x: float) -> float:
    """e to the power x; infinite where it is too large."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _method(function: Callable[[float, float], float], *, reflected: bool = False) -> Any:
    def method(self: float, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            # a tensor knows what to do with a float
            return NotImplemented
        a, b = float(self), float(other)
        return Number(function(b, a) if reflected else function(a, b))

    return method


class Number(float):
    """A float whose arithmetic never raises: 1 / 0 is infinite, (-1) ** 0.5 is NaN."""

    __slots__ = ()

    __add__ = _method(operator.add)
    __radd__ = _method(operator.add, reflected=True)
    __sub__ = _method(operator.sub)
    __rsub__ = _method(operator.sub, reflected=True)
    __mul__ = _method(operator.mul)
    __rmul__ = _method(operator.mul, reflected=True)
    __truediv__ = _method(divide)
    __rtruediv__ = _method(divide, reflected=True)
    __pow__ = _method(power)
    __rpow__ = _method(power, reflected=True)

    def __neg__(self) -> Number:
        return Number(-float(self))

    def __abs__(self) -> Number:
        return Number(abs(float(self)))


class Followed(Number):
    """A number that autograd follows: to it, it is this tensor."""

    __slots__ = ("tensor",)

    def __new__(cls, tensor: Tensor) -> Followed:
        """The number in a tensor of one element."""
        made = super().__new__(cls, tensor.item())
        made.tensor = tensor
        return made

    tensor: Tensor


def added(numbers: Iterable[float]) -> float:
    """The exact sum, rounded once; autograd follows it to those that it follows."""
    numbers = list(numbers)
    total = math.fsum(numbers)
    followed = [number.tensor for number in numbers if isinstance(number, Followed)]
    if not followed:
        return total
    tensor = sum(followed[1:], start=followed[0])
    rounding = total - tensor.item()
    return Followed(tensor + rounding if math.isfinite(rounding) else tensor)
