"""Averages in the precision in which they are computed, beside tensors that hold them rounded.

A tensor in half precision, or of whole numbers, that held an average alone would stop moving where
an update is smaller than half a unit in its last place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["ExactCopies", "is_inexact", "needs_copy"]


def _exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of this one are averaged."""
    if dtype.is_floating_point and dtype.itemsize == 1:
        # torch does not promote those of 8 bits
        return torch.float32
    if dtype.is_floating_point or dtype.is_complex:
        return torch.promote_types(dtype, torch.float32)
    return torch.float64


def is_inexact(tensor: Tensor) -> bool:
    """Whether the tensor holds no whole numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def needs_copy(tensor: Tensor) -> bool:
    """Whether the tensor cannot hold its average: half precision, or whole numbers."""
    is_plain = not is_lazy(tensor) and tensor.layout is torch.strided
    return (
        is_plain
        and tensor.dtype is not torch.bool
        and _exact_dtype(tensor.dtype) is not tensor.dtype
    )


class ExactCopies:
    """Copies, beside tensors in a list that cannot hold their average, by places in that list.

    Both can be written to by others. Elements of a tensor that are not those of its copy, rounded,
    replace these. A copy that was written to holds as a whole.
    """

    def __init__(self, copies: Mapping[int, Tensor] | None = None) -> None:
        self._copies: dict[int, Tensor] = dict(copies or {})
        self._versions: dict[int, int] = {}
        self.note()

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        # the versions of a copied tensor count anew
        vars(self).update(state)
        self.note()

    def note(self) -> None:
        """Take what the copies hold now as theirs."""
        self._versions = {place: copy._version for place, copy in self._copies.items()}

    def clear(self) -> None:
        """Forget all copies."""
        self._copies, self._versions = {}, {}

    def drop(self, place: int) -> None:
        """Forget the copy of a tensor."""
        del self._copies[place], self._versions[place]

    def get(self, place: int, tensor: Tensor) -> Tensor:
        """The average that a tensor holds: its copy, up to date, or itself if it needs none."""
        dtype = _exact_dtype(tensor.dtype)
        if dtype is tensor.dtype:
            return tensor
        known = self._copies.get(place)
        # it is going to be written to outside of inference mode too
        with torch.inference_mode(False), torch.no_grad():
            if known is None or known.shape != tensor.shape or known.is_meta:
                known = tensor.to(dtype)
            else:
                is_written = known._version != self._versions[place]
                known = known.to(tensor.device, dtype)
                if not is_written:
                    known.copy_(torch.where(known.to(tensor.dtype) == tensor, known, tensor))
        self._copies[place], self._versions[place] = known, known._version
        return known

    def round_into(self, tensors: Sequence[Tensor]) -> None:
        """Write the copies, rounded, into their tensors."""
        with torch.no_grad():
            for place, copy in self._copies.items():
                if place < len(tensors) and tensors[place].shape == copy.shape:
                    tensors[place].copy_(copy)
        self.note()

    def loaded(self, values: Mapping[int, Tensor], tensors: Sequence[Tensor]) -> ExactCopies:
        """The copies once these values are loaded into these tensors; self stays as it is."""
        made = ExactCopies(self._copies)
        for place, value in values.items():
            tensor = tensors[place]
            with torch.inference_mode(False), torch.no_grad():
                dtype = _exact_dtype(tensor.dtype)
                made._copies[place] = value.to(tensor.device, dtype, copy=True)
        made.note()
        return made

    def follow(self, dtypes: Sequence[torch.dtype], tensors: Sequence[Tensor]) -> None:
        """Give tensors that had these dtypes, and are of others now, what those can hold."""
        for place, copy in list(self._copies.items()):
            if place >= len(tensors) or tensors[place].shape != copy.shape:
                continue
            tensor, dtype = tensors[place], dtypes[place]
            if tensor.dtype is dtype or tensor.is_meta or copy.is_meta:
                continue
            with torch.no_grad():
                copy = copy.to(tensor.device)
                is_known = copy.to(dtype) == tensor.to(dtype)
                tensor.copy_(torch.where(is_known, copy, tensor))
            if not needs_copy(tensor):
                del self._copies[place]
        self.note()
