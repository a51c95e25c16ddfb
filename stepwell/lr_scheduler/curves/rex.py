"""rex: slow at first, then ever faster, for a fixed budget of steps."""

from __future__ import annotations

from dataclasses import dataclass

from .composition import END, STEPS, Curve, blend


@dataclass(frozen=True, repr=False)
class rex(Curve):  # noqa: N801
    """A reflected exponential: near 1 for long, then ever steeper down to `end`.

        value(t) = end + (1 - end) (1 - t / steps) / (1 - t / (2 steps))

    Paper: Chen, Wolfe and Kyrillidis, REX: Revisiting Budgeted Training with an Improved
    Schedule, arXiv:2107.04197.

    Args:
        steps: how many steps the way down takes
        end: the value at step `steps`, and ever after

    >>> rex(3)(0), rex(3)(2), rex(3)(3)
    (1.0, 0.5, 0.0)
    """

    steps: float
    end: float = 0.0

    checks = (STEPS, END)

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        share = step / self.steps
        return blend(self.end, 1.0, (1.0 - share) / (1.0 - share / 2.0))
