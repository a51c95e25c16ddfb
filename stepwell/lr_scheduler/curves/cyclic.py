"""cyclic: up and down, again and again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ...language.fields import Field, Range
from .composition import GAMMA, LASTING, Curve, blend, power

UP = Field("up", None, "number", Range(0, open="("))
DOWN = Field("down", None, "number", Range(0), optional=True)
MODES = ("triangular", "triangular2", "exp_range")


@dataclass(frozen=True, repr=False)
class cyclic(Curve):  # noqa: N801
    """Straight lines from `low` up to a peak and back, again and again.

        value(t) = low + (1 - low) height(t) peak(t)

    `height` is 0 at the ends of a cycle and 1 in between. `peak` is 1 ("triangular"), halves with
    each cycle ("triangular2"), or is gamma ^ t ("exp_range").

    Paper: Smith, Cyclical Learning Rates for Training Neural Networks, arXiv:1506.01186.

    Args:
        up: how many steps the way up takes
        down: how many steps the way down takes; None: as many; 0: it falls at once
        low: the value between two cycles
        mode: how high the peaks are
        gamma: the factor of "exp_range"
        steps: how long it lasts, in front of `>>`; None: for ever

    >>> [cyclic(2, low=0.5)(step) for step in range(5)]
    [0.5, 0.75, 1.0, 0.75, 0.5]
    """

    up: float
    down: float | None = None
    low: float = 0.0
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: float = 1.0
    steps: float | None = None

    checks = (
        UP,
        DOWN,
        Field("low", 0.0, "number", Range(0)),
        Field("mode", "triangular", "choice", choices=MODES),
        GAMMA,
        LASTING,
    )

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        return blend(self.low, 1.0, self.height(step) * self.peak(step))

    def height(self, step: float) -> float:
        """From 0 to 1 and back, within each cycle."""
        down = self.up if self.down is None else self.down
        within = step % (self.up + down)
        return within / self.up if within <= self.up else (self.up + down - within) / down

    def peak(self, step: float) -> float:
        """How high the cycle of this step reaches."""
        counted = step if self.mode == "exp_range" else self.cycle(step)
        return scale(self.mode, self.gamma, counted)

    def cycle(self, step: float) -> int:
        """The number of the cycle of this step; the first is 1."""
        down = self.up if self.down is None else self.down
        return 1 + math.floor(step / (self.up + down))


def scale(mode: str, gamma: float, counted: float) -> float:
    """How high a peak is: of this cycle, or, for "exp_range", at this step."""
    if mode == "triangular2":
        return power(0.5, counted - 1)
    return power(gamma, counted) if mode == "exp_range" else 1.0
