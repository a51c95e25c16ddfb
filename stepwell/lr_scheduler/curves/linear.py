"""linear: a straight line."""

from __future__ import annotations

from dataclasses import dataclass

from ...language.fields import Field, Range
from .composition import STEPS, Curve, blend


@dataclass(frozen=True, repr=False)
class linear(Curve):  # noqa: N801
    """A straight line from one value to another.

        value(t) = start (1 - t / steps) + end t / steps

    Args:
        start: the value at step 0
        end: the value at step `steps`, and ever after
        steps: how many steps the way takes

    >>> [linear(1.0, 0.5, 4)(step) for step in range(6)]
    [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
    """

    start: float
    end: float
    steps: float

    checks = (
        Field("start", None, "number", Range(0)),
        Field("end", None, "number", Range(0)),
        STEPS,
    )

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        return blend(self.start, self.end, step / self.steps)
