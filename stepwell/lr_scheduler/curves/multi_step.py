"""multi_step: a staircase with stairs where they are wanted."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...language.fields import Field, Range
from .composition import GAMMA, LASTING, Curve, power, whole

MILESTONE = Field("milestones", None, "integer", Range(0))


@dataclass(frozen=True, repr=False)
class multi_step(Curve):  # noqa: N801
    """The same factor at each of the milestones.

        value(t) = gamma ^ (number of milestones <= t)

    Args:
        milestones: the steps at which the value changes, in ascending order; a step that stands
            there twice counts twice
        gamma: the factor of each change
        steps: how long it lasts, in front of `>>`; None: for ever

    >>> [multi_step([1, 3], gamma=0.5)(t) for t in range(5)]
    [1.0, 0.5, 0.5, 0.25, 0.25]
    """

    milestones: tuple[int, ...]
    gamma: float = 0.1
    steps: float | None = None

    checks = (GAMMA, LASTING)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "milestones", ascending(self.milestones, type(self).__name__))

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        return power(self.gamma, bisect_right(self.milestones, step))


def require_many(milestones: Any, owner: str, kind: type = Iterable) -> None:
    """Check that these can be several milestones.

    Raises:
        TypeError: it is a number, or something else
    """
    if not isinstance(milestones, kind):
        raise TypeError(
            f"Invalid milestones value: {milestones!r} ({owner}: milestones must be a list of "
            f"whole numbers {MILESTONE.allowed})"
        )


def ascending(milestones: Iterable[int], owner: str) -> tuple[int, ...]:
    """The milestones as whole numbers.

    Raises:
        ValueError, TypeError: one is negative or no whole number, or they are not in order
    """
    require_many(milestones, owner)
    steps = tuple(int(MILESTONE.check(whole(step), owner)) for step in milestones)
    if list(steps) != sorted(steps):
        raise ValueError(
            f"Invalid milestones value: {list(steps)} ({owner}: milestones must be in ascending "
            f"order: {sorted(steps)})"
        )
    return steps
