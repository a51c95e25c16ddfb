"""Searches along a line: from a first `t` to the point that is taken.

Each is told how many evaluations there is a budget for. It stops there if it knows a lower point.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .objective import Line, Point

__all__ = ["Search", "first_finite", "leap", "strong_wolfe"]

Search = Callable[[Line, float, int], Point]

# the least fall of the loss, and the largest slope at the end, as shares of the slope at the start
ARMIJO, CURVATURE = 1e-4, 0.9
# how many roundings a loss may be off
NOISE = 4
# how many times farther a search may leap, and how near to an end of its interval it may go twice
FARTHEST, MARGIN = 10, 0.1
# how often a search tries at most
TRIALS = 25


def leap(line: Line, t: float, budget: int) -> Point:
    """The point at `t`, without a look at the loss; the start if a parameter is infinite there."""
    line.move(t)
    line.is_broken = not line.objective.is_finite()
    return line.start if line.is_broken else line.start._replace(t=t)


def first_finite(line: Line, t: float, budget: int) -> Point:
    """The point at `t`, or nearer where that is not finite; the start if none is."""
    for tries in range(1, TRIALS + 1):
        point = line.evaluate(t)
        if point.is_finite:
            return point
        t *= 0.5**tries
        if t <= line.shortest:
            break
    return line.start


def strong_wolfe(line: Line, t: float, budget: int) -> Point:
    """A point that satisfies the strong Wolfe conditions, or else the best that was seen.

    Nocedal and Wright, algorithms 3.5 and 3.6 in one loop. As long as `high` is unknown, trials
    go farther; then they lie between it and `low`, the best point that falls enough.
    """
    start = low = previous = line.start
    high: Point | None = None
    # where losses differ by rounding alone, a search that trusts them goes on in vain
    noise = NOISE * torch.finfo(start.grad.dtype).eps * abs(start.loss)
    bad, is_close = 0, False
    for tries in range(TRIALS):
        if tries >= budget and line.best is not start:
            break
        trial = line.evaluate(t)
        falls = trial.is_finite and trial.loss <= start.loss + ARMIJO * t * start.slope + noise
        if falls and abs(trial.slope) <= -CURVATURE * start.slope:
            return trial
        if not falls or (trial.loss >= low.loss and low is not start):
            high = trial
        else:
            if trial.slope * ((math.inf if high is None else high.t) - low.t) >= 0:
                high = low
            previous, low = low, trial
        bad = 0 if trial.is_finite else bad + 1
        if high is None:
            t = lowest_between(previous, low, 1.01 * low.t - 0.01 * previous.t, FARTHEST * low.t)
        elif abs(high.t - low.t) <= max(line.shortest, noise / max(-start.slope, abs(low.slope))):
            break
        elif high.is_finite:
            t, is_close = inside(low, high, is_close)
        else:
            t = low.t + (high.t - low.t) * 0.5 ** max(bad, 1)
    return line.best


def inside(low: Point, high: Point, was_close: bool) -> tuple[float, bool]:
    """The next trial between two points, and whether it is close to one of them."""
    left, right = sorted((low.t, high.t))
    t = lowest_between(low, high, left, right)
    margin = MARGIN * (right - left)
    is_close = not left + margin <= t <= right - margin
    if is_close and (was_close or t in (left, right)):
        return min(max(t, left + margin), right - margin), False
    return t, is_close


def lowest_between(a: Point, b: Point, left: float, right: float) -> float:
    """Where the cubic through two points is lowest: Nocedal and Wright (3.59), kept within."""
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if 0 <= square < math.inf:
        d2 = math.copysign(math.sqrt(square), b.t - a.t)
        denom = b.slope - a.slope + 2 * d2
        if denom != 0:
            return min(max(b.t - (b.t - a.t) * (b.slope + d2 - d1) / denom, left), right)
    return (left + right) / 2
