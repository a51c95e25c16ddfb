"""step: a staircase with stairs of one length."""

from __future__ import annotations

from dataclasses import dataclass

from ...language.fields import Field, Range
from .composition import GAMMA, LASTING, Curve, power, whole


@dataclass(frozen=True, repr=False)
class step(Curve):  # noqa: N801
    """The same factor once in `step_size` steps.

        value(t) = gamma ^ floor(t / step_size)

    Args:
        step_size: how many steps lie between two changes
        gamma: the factor of each change
        steps: how long it lasts, in front of `>>`; None: for ever

    >>> [step(2, gamma=0.5)(t) for t in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    step_size: int
    gamma: float = 0.1
    steps: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", whole(self.step_size))
        super().__post_init__()

    checks = (Field("step_size", None, "integer", Range(1)), GAMMA, LASTING)

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        return power(self.gamma, step // self.step_size)
