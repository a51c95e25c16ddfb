"""one_cycle: one way up, and a longer one down to almost nothing."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ...language.fields import Field, Range
from .composition import END, STEPS, Curve, blend, wave


@dataclass(frozen=True, repr=False)
class one_cycle(Curve):  # noqa: N801
    """One way up from `start` to 1, and one down to `end`, in two or three phases.

        value(t) = a + (b - a) (1 - cos(pi u)) / 2       ("cos")
        value(t) = a + (b - a) u                         ("linear")

    where a phase leads from a to b, and u is the share of the phase that is over. The first one
    ends at step rise steps - 1, the last one at step steps - 1; with three phases the second one
    leads back to `start`, in as many steps as the first.

    Paper: Smith and Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large
    Learning Rates, arXiv:1708.07120.

    Args:
        steps: how many steps all phases take
        start: the value at step 0
        end: the value at step `steps - 1`, and ever after
        rise: the share of the steps that the way up takes; with three phases, the way back takes
            as many, and has to end before step `steps - 1`
        shape: the form of the lines
        three_phase: go down to `start` first, and to `end` then

    >>> curve = one_cycle(10, start=0.5, end=0.0, rise=0.5, shape="linear")
    >>> [curve(step) for step in (0, 2, 4, 9)]
    [0.5, 0.75, 1.0, 0.0]
    """

    steps: float
    start: float = 1 / 25
    end: float = 1 / 250_000
    rise: float = 0.3
    shape: Literal["cos", "linear"] = "cos"
    three_phase: bool = False

    checks = (
        STEPS,
        Field("start", 1 / 25, "number", Range(0)),
        END,
        Field("rise", 0.3, "number", Range(0, 1)),
        Field("shape", "cos", "choice", choices=("cos", "linear")),
        Field("three_phase", False, "flag"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        *_, back, last = ends(self.steps, self.rise, self.three_phase)
        if self.three_phase and back >= last:
            raise ValueError(
                f"Invalid rise value: {self.rise} (one_cycle: with three phases of {self.steps:g} "
                f"steps in all, rise must be in [0, {(self.steps + 1) / (2 * self.steps):g}), so "
                "that the last one comes after the way up and the way back)"
            )

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        index, over = phase(ends(self.steps, self.rise, self.three_phase), step)
        corners = (self.start, 1.0, self.start, self.end)
        ways = list(pairwise(corners)) if self.three_phase else [corners[:2], (1.0, self.end)]
        return blend(*ways[index], SHAPES[self.shape](over))


def ends(steps: float, rise: float, three_phase: bool) -> list[float]:
    """The step at which each phase ends."""
    back = [2.0 * rise * steps - 2.0] if three_phase else []
    return [rise * steps - 1.0, *back, steps - 1.0]


SHAPES: dict[str, Callable[[float], float]] = {
    "cos": lambda over: 1.0 - wave(over),
    "linear": lambda over: over,
}


def phase(ends: Sequence[float], step: float) -> tuple[int, float]:
    """The number of the phase of a step, and the share of the phase that is over, at most 1."""
    index = min(bisect_left(ends, step), len(ends) - 1)
    start = ends[index - 1] if index else 0.0
    length = ends[index] - start
    return index, min((step - start) / length, 1.0) if length else 1.0
