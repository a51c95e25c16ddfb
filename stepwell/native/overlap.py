"""Stretches of memory that share bytes, among any number of them at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["overlapping"]


def overlapping(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which of these stretches of memory share bytes with another of them."""
    found = np.zeros(starts.shape, bool)
    used = np.flatnonzero(ends > starts)
    order = used[np.argsort(starts[used], kind="stable")]
    reach = np.maximum.accumulate(ends[order])
    behind = np.zeros(len(order), bool)
    behind[1:] = starts[order][1:] < reach[:-1]
    found[order] = behind
    # whoever is reached into shares as well
    found[order[:-1]] |= behind[1:]
    return found
