"""exponential: the same factor at every step."""

from __future__ import annotations

from dataclasses import dataclass

from .composition import GAMMA, LASTING, Curve, power


@dataclass(frozen=True, repr=False)
class exponential(Curve):  # noqa: N801
    """The same factor at every step.

        value(t) = gamma ^ t

    Args:
        gamma: the factor
        steps: how long it lasts, in front of `>>`; None: for ever

    >>> [exponential(0.5)(step) for step in range(4)]
    [1.0, 0.5, 0.25, 0.125]
    """

    gamma: float
    steps: float | None = None

    checks = (GAMMA, LASTING)

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        return power(self.gamma, step)
