"""polynomial: a power of what is left, down to a floor."""

from __future__ import annotations

from dataclasses import dataclass

from ...language.fields import Field, Range
from .composition import END, STEPS, Curve, blend, power


@dataclass(frozen=True, repr=False)
class polynomial(Curve):  # noqa: N801
    """A power of the share of steps that is left, from 1 down to a floor.

        value(t) = end + (1 - end) (1 - t / steps) ^ power

    Args:
        steps: how many steps the way down takes
        power: 1 is a straight line; a larger one falls faster at first
        end: the floor, which is reached at step `steps`

    >>> polynomial(4, power=2)(2), polynomial(4, power=2, end=0.1)(9)
    (0.25, 0.1)
    """

    steps: float
    power: float = 1.0
    end: float = 0.0

    checks = (STEPS, Field("power", 1.0, "number", Range(0)), END)

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        return blend(self.end, 1.0, power(1.0 - step / self.steps, self.power))
