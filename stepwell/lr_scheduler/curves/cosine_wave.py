"""cosine_wave: down and up again."""

from __future__ import annotations

from dataclasses import dataclass

from ...language.fields import Field, Range
from .composition import END, LASTING, Curve, blend, wave


@dataclass(frozen=True, repr=False)
class cosine_wave(Curve):  # noqa: N801
    """A cosine from 1 down to `end`, up again, and so on.

        value(t) = end + (1 - end) (1 + cos(pi t / half)) / 2

    Args:
        half: how many steps the way down takes, and the way up
        end: the value that the wave falls to
        steps: how long it lasts, in front of `>>`; None: for ever

    >>> [cosine_wave(2)(step) for step in (0, 1, 2, 3, 4)]
    [1.0, 0.5, 0.0, 0.499..., 1.0]
    """

    half: float
    end: float = 0.0
    steps: float | None = None

    checks = (Field("half", None, "number", Range(0, open="(")), END, LASTING)

    def at(self, step: float) -> float:
        """The value at a step that lies in [0, steps]."""
        return blend(self.end, 1.0, wave(step / self.half))
