"""warmup_stable_decay: up, level, down."""

from __future__ import annotations

from .composition import Curve
from .constant import constant
from .linear import linear
from .warmup import warmup


def warmup_stable_decay(rise: int, level: int, decay: int | Curve) -> Curve:
    """A warm-up, a level on which training may go on for as long as it likes, and a decay.

        warmup(rise) >> constant(steps=level) >> decay

    Paper: Hu et al., MiniCPM: Unveiling the Potential of Small Language Models with Scalable
    Training Strategies, arXiv:2404.06395.

    Args:
        rise: the steps of the warm-up
        level: the steps at the full rate
        decay: the steps of a straight line down to zero, or another curve that starts at 1

    >>> warmup_stable_decay(100, 800, 100)
    warmup(100) >> constant(steps=800) >> linear(1.0, 0.0, 100)
    """
    fall = decay if isinstance(decay, Curve) else linear(1.0, 0.0, decay)
    return warmup(rise) >> constant(steps=level) >> fall
