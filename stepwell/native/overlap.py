"""Memory that several tensors share: stretches of it, and the elements of tensors with gaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["overlapping", "sharing"]

Flags = npt.NDArray[np.bool_]

WRITTEN, READ = 1, 2


def overlapping(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Flags:
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


class Span(NamedTuple):
    """The memory of a tensor: its first byte, the end of its last element, its steps in bytes."""

    start: int
    end: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, tensor: Tensor) -> Span:
        """Return the span of a strided tensor; on the meta device the span has no bytes."""
        shape, itemsize = tuple(tensor.shape), tensor.element_size()
        steps = tuple(step * itemsize for step in tensor.stride())
        start = tensor.data_ptr()
        last = sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
        size = last + itemsize if tensor.numel() and not tensor.is_meta else 0
        return cls(start, start + size, shape, steps, itemsize)

    @property
    def is_stretch(self) -> bool:
        """Return whether the span has no gaps."""
        return math.prod(self.shape) * self.itemsize == self.end - self.start


def sharing(written: Sequence[Tensor], read: Sequence[Tensor] = ()) -> Flags:
    """Which of these strided tensors have an element in the memory of another that is written.

    One may lie in the gaps of another, as the columns of a matrix do, and share nothing. Those
    that are `read` come after the others in the result, and may share what nothing writes to.
    """
    spans = list(map(Span.of, (*written, *read)))
    starts = np.array([span.start for span in spans], np.int64)
    ends = np.array([span.end for span in spans], np.int64)
    found = overlapping(starts, ends)
    close = np.flatnonzero(found)
    if all(i < len(written) and spans[i].is_stretch for i in close):
        return found
    close = close[np.argsort(starts[close], kind="stable")]
    reach = np.maximum.accumulate(ends[close])
    cuts = np.flatnonzero(starts[close][1:] >= reach[:-1]) + 1
    for cluster in np.split(close, cuts):
        marks = [WRITTEN if i < len(written) else READ for i in cluster]
        found[cluster] = _meeting([spans[i] for i in cluster], marks)
    return found


def _meeting(spans: Sequence[Span], marks: Sequence[int]) -> Flags:
    """`sharing`, element by element."""
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    places = ((span.start - start, span.itemsize, *span.steps) for span in spans)
    unit = math.gcd(*chain.from_iterable(places))
    found = np.zeros(len(spans), bool)
    numbers = range(len(spans))
    # those before it in one order, those after it in the other
    for order in (numbers, reversed(numbers)):
        taken = np.zeros((end - start) // unit, np.uint8)
        for i in order:
            span = spans[i]
            elements = np.lib.stride_tricks.as_strided(
                taken[(span.start - start) // unit :],
                (*span.shape, span.itemsize // unit),
                (*(step // unit for step in span.steps), 1),
            )
            matters = WRITTEN | READ if marks[i] == WRITTEN else WRITTEN
            found[i] |= bool((elements & matters).any())
            elements |= np.uint8(marks[i])
    return found
