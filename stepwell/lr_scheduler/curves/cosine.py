"""cosine: half a wave, from 1 down to a floor."""

from __future__ import annotations

from dataclasses import dataclass

from .composition import END, STEPS, Curve, blend, wave


@dataclass(frozen=True, repr=False)
class cosine(Curve):  # noqa: N801
    """Half a wave of a cosine, from 1 down to `end`.

        value(t) = end + (1 - end) (1 + cos(pi t / steps)) / 2

    Paper: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts,
    arXiv:1608.03983.

    Args:
        steps: how many steps the way down takes
        end: the value at step `steps`, and ever after

    >>> cosine(4)(2), cosine(4, end=0.1)(9)
    (0.5, 0.1)
    """

    steps: float
    end: float = 0.0

    checks = (STEPS, END)

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        return blend(self.end, 1.0, wave(step / self.steps))
