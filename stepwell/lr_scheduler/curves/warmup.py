"""warmup: from almost nothing to the full rate."""

from __future__ import annotations

from dataclasses import dataclass

from .composition import STEPS, Curve


@dataclass(frozen=True, repr=False)
class warmup(Curve):  # noqa: N801
    """A straight line up to 1 which wastes no step at zero.

        value(t) = (t + 1) / (steps + 1)

    The step after the last one of the warm-up, number `steps`, is the first at the full rate. A
    line that starts at zero is `linear(0, 1, steps)`.

    Args:
        steps: how many steps are taken below the full rate

    >>> [warmup(4)(step) for step in range(6)]
    [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    """

    steps: float

    checks = (STEPS,)

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        return (step + 1) / (self.steps + 1)
