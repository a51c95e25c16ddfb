"""Averages in the precision in which they are computed, beside tensors that hold them rounded.

A tensor in half precision, or of whole numbers, that held an average alone would stop moving where
an update is smaller than half a unit in its last place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .language.number import is_fake

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
    """Return whether the tensor holds floating-point or complex numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def needs_copy(tensor: Tensor) -> bool:
    """Return whether the tensor cannot hold its average: half precision or whole numbers."""
    is_plain = not is_lazy(tensor) and tensor.layout is torch.strided
    return (
        is_plain
        and tensor.dtype is not torch.bool
        and _exact_dtype(tensor.dtype) is not tensor.dtype
    )


def _belongs(copy: Tensor | None, tensor: Tensor) -> TypeGuard[Tensor]:
    """Return whether the copy holds the values of such a tensor."""
    return copy is not None and copy.shape == tensor.shape and not copy.is_meta


def _local(tensor: Tensor) -> Tensor:
    """The tensor; of a DTensor, what this process holds of it."""
    with torch.no_grad():
        part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _version(tensor: Tensor) -> int:
    """A count of the changes in place; of a DTensor, also of those of its part in this process."""
    part = _local(tensor)
    return tensor._version + (0 if part is tensor else part._version)


class ExactCopies:
    """Copies, beside tensors in a list that cannot hold their average, by places in that list.

    Both can be written to by others. `show` writes a copy that was written to into its tensor.
    Elements of a tensor that are not those of its copy, rounded, replace these: somebody has
    written them.
    """

    def __init__(self, copies: Mapping[int, Tensor] | None = None) -> None:
        self._copies: dict[int, Tensor] = dict(copies or {})
        self._before: dict[int, Tensor] = {}
        self._count()

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update({"_before": {}, **state})
        # the versions of a copied tensor count anew
        self._count()

    def _count(self) -> None:
        self._versions = {place: _version(copy) for place, copy in self._copies.items()}

    def note(self) -> None:
        """Take what the copies hold now as theirs."""
        self._before.clear()
        self._count()

    def clear(self) -> None:
        """Forget all copies."""
        self._copies, self._versions, self._before = {}, {}, {}

    def drop(self, place: int) -> None:
        """Forget the copy of a tensor."""
        for known in (self._copies, self._versions, self._before):
            known.pop(place, None)

    def are_written(self) -> bool:
        """Return whether others have written into copies since their versions were noted."""
        return any(_version(copy) != self._versions[at] for at, copy in self._copies.items())

    def get(self, place: int, tensor: Tensor) -> Tensor:
        """The average that a tensor holds: its copy, up to date, or itself if it needs none."""
        dtype = _exact_dtype(tensor.dtype)
        if dtype is tensor.dtype:
            return tensor
        known = self._copies.get(place)
        # it is going to be written to outside of inference mode too
        with torch.inference_mode(False), torch.no_grad():
            if not _belongs(known, tensor):
                known = tensor.to(dtype)
            else:
                known = known.to(tensor.device, dtype)
                held, before = tensor, self._before.get(place)
                if _belongs(before, tensor):
                    before = before.to(tensor.device, dtype)
                    held = torch.where(before.to(tensor.dtype) == tensor, before, tensor)
                known.copy_(torch.where(known.to(tensor.dtype) == tensor, known, held))
        self._copies[place], self._versions[place] = known, _version(known)
        return known

    def get_for_reading(self, place: int, tensor: Tensor) -> Tensor:
        """As `get`; where other weights stand in the tensor for a while, it can be put back.

        This waits for the device.
        """
        known = self._copies.get(place)
        if _belongs(known, tensor) and not is_fake(tensor) and place not in self._before:
            rounded = _local(known).to(tensor.device, tensor.dtype)
            if not torch.equal(rounded, _local(tensor)):
                self._before[place] = known.clone()
        return self.get(place, tensor)

    def show(self, tensors: Sequence[Tensor]) -> None:
        """Write the copies that others have written to, rounded, into their tensors."""
        for place, copy in self._copies.items():
            if _version(copy) != self._versions[place]:
                self._before.pop(place, None)
                self._round(place, tensors)
        self._count()

    def round_into(self, tensors: Sequence[Tensor]) -> None:
        """Write the copies, rounded, into their tensors."""
        for place in self._copies:
            self._round(place, tensors)
        self.note()

    def _round(self, place: int, tensors: Sequence[Tensor]) -> None:
        copy = self._copies[place]
        if place < len(tensors) and tensors[place].shape == copy.shape:
            with torch.no_grad():
                tensors[place].copy_(copy)

    def loaded(self, values: Mapping[int, Tensor], tensors: Sequence[Tensor]) -> ExactCopies:
        """The copies once these values are loaded into these tensors; self stays as it is."""
        made = ExactCopies(self._copies)
        for place, value in values.items():
            tensor = tensors[place]
            with torch.inference_mode(False), torch.no_grad():
                dtype = _exact_dtype(tensor.dtype)
                made._copies[place] = value.to(tensor.device, dtype, copy=True)
        made.note()
        made._before = {at: kept for at, kept in self._before.items() if at not in values}
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
