"""inverse_sqrt: one over the square root of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...language.fields import Field, Range
from .composition import LASTING, Curve


@dataclass(frozen=True, repr=False)
class inverse_sqrt(Curve):  # noqa: N801
    """One over the square root of the step, which has no end to plan for.

        value(t) = sqrt(timescale / (timescale + t))

    After as many steps of warm-up as the timescale, `warmup(n) >> inverse_sqrt(n)`, this is the
    schedule of the Transformer: Vaswani et al., Attention Is All You Need, arXiv:1706.03762.

    Args:
        timescale: after three times as many steps, the value is one half
        steps: how long it lasts, in front of `>>`; None: for ever

    >>> inverse_sqrt(100)(0), inverse_sqrt(100)(300)
    (1.0, 0.5)
    """

    timescale: float
    steps: float | None = None

    checks = (Field("timescale", None, "number", Range(0, open="(")), LASTING)

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        return math.sqrt(self.timescale / (self.timescale + step))
