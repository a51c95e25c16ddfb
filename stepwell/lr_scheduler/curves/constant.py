"""constant: one value."""

from __future__ import annotations

from dataclasses import dataclass

from ...language.fields import Field, Range
from .composition import LASTING, Curve


@dataclass(frozen=True, repr=False)
class constant(Curve):  # noqa: N801
    """One value at every step.

        value(t) = value

    Args:
        value: the value
        steps: how long it lasts, in front of `>>`; None: for ever

    >>> constant(0.5)(7)
    0.5
    """

    value: float = 1.0
    steps: float | None = None

    checks = (Field("value", 1.0, "number", Range(0)), LASTING)

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        return self.value
