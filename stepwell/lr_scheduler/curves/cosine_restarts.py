"""cosine_restarts: waves of a cosine that start again at the top."""

from __future__ import annotations

from dataclasses import dataclass

from ...language.fields import Field, Range
from .composition import END, LASTING, Curve, blend, wave


@dataclass(frozen=True, repr=False)
class cosine_restarts(Curve):  # noqa: N801
    """Half waves of a cosine, each of which starts at 1 again; the n-th lasts first growth^n steps.

        value(t) = end + (1 - end) (1 + cos(pi u / length)) / 2

    where u is the number of steps since the latest restart.

    Paper: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts,
    arXiv:1608.03983.

    Args:
        first: how many steps the first wave takes
        growth: how many times longer each wave is than the one before it
        end: the value that a wave falls to
        steps: how long it lasts, in front of `>>`; None: for ever

    >>> [cosine_restarts(2, growth=2)(step) for step in (0, 1, 2, 4, 6)]
    [1.0, 0.5, 1.0, 0.5, 1.0]
    """

    first: int
    growth: int = 1
    end: float = 0.0
    steps: float | None = None

    checks = (
        Field("first", None, "integer", Range(1)),
        Field("growth", 1, "integer", Range(1)),
        END,
        LASTING,
    )

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        since, length = self.cycle(step)
        return blend(self.end, 1.0, wave(since / length))

    def cycle(self, step: float) -> tuple[float, int]:
        """How many steps ago the wave of this step started, and how many steps it lasts."""
        if self.growth == 1:
            return step % self.first, self.first
        length = self.first
        while step >= length:
            step -= length
            length *= self.growth
        return step, length
