"""Aliasing: which parameters share memory, so that one must be updated after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cohort import PLAIN_TYPES
from .native.overlap import Flags, sharing

__all__ = ["Aliasing", "Touched"]


class Touched(NamedTuple):
    """What the update of one parameter writes, and its gradient."""

    written: Sequence[Tensor]
    grad: Tensor | None


class Aliasing:
    """Which parameters share memory; worked out again when something that is written has moved."""

    def __init__(self) -> None:
        self._places: list[int] | None = None
        self._found: Flags = np.zeros(0, bool)

    def among(self, rows: Sequence[Touched]) -> Flags:
        """Which of these write where another writes or reads, or read where another writes."""
        written = [(i, t) for i, row in enumerate(rows) for t in row.written if _has_memory(t)]
        places = [tensor.data_ptr() for _, tensor in written]
        if places != self._places:
            self._places = places
            read = [
                (i, row.grad)
                for i, row in enumerate(rows)
                if row.grad is not None
                and _has_memory(row.grad)
                and not _is_same_memory(row.grad, row.written[0])
            ]
            owners = np.array([i for i, _ in [*written, *read]], np.int64)
            shared = sharing([tensor for _, tensor in written], [grad for _, grad in read])
            self._found = np.zeros(len(rows), bool)
            self._found[owners[shared]] = True
        return self._found


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is what lies at its address."""
    return type(tensor) in PLAIN_TYPES and tensor.layout is torch.strided


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether element by element these two lie at the same place."""
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype is b.dtype
