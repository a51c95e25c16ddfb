"""one_cycle: one way up, and a longer one down to almost nothing."""

from __future__ import annotations

from bisect import bisect_left
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
        rise: the share of the steps that the way up takes
        shape: the form of the lines
        three_phase: go down to `start` first, and to `end` then

    >>> [round(one_cycle(11, start=0.5, end=0.0, rise=0.5)(step), 3) for step in (0, 4, 5, 10)]
    [0.5, 0.989, 0.992, 0.0]
    """

    steps: int
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

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        index, share = self.phase(step)
        corners = (self.start, 1.0, self.start, self.end)
        ways = list(pairwise(corners)) if self.three_phase else [corners[:2], (1.0, self.end)]
        return blend(*ways[index], share)

    def phase(self, step: float) -> tuple[int, float]:
        """The number of the phase of this step, and how far it has led to its end: 0 to 1."""
        ends = [self.rise * self.steps - 1.0, self.steps - 1.0]
        if self.three_phase:
            ends.insert(1, 2.0 * self.rise * self.steps - 2.0)
        index = min(bisect_left(ends, step), len(ends) - 1)
        start = ends[index - 1] if index else 0.0
        length = ends[index] - start
        over = min((step - start) / length, 1.0) if length else 1.0
        return index, over if self.shape == "linear" else 1.0 - wave(over)
