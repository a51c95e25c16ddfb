"""Tables that the host writes and a device reads, without either waiting for the other.

A copy from pinned memory runs behind the host's back: the memory must stay as it is until then.
torch's allocator of pinned memory sees to that, so every upload goes through a piece of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Mirror", "Uploaded", "current_stream", "is_capturing", "made_current", "upload"]


# How many captured steps can follow each other before pinned memory has to be asked for.
SPARES = 2


def is_capturing(device: torch.device) -> bool:
    """Whether work on the device is being captured into a graph, not done."""
    ask = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    if ask is None:
        return False
    with made_current(device):
        return bool(ask())


def current_stream(device: torch.device) -> Any:
    """The stream that work on the device goes to; None on a CPU."""
    if device.type == "cpu":
        return None
    return torch.get_device_module(device).current_stream(device)


class made_current:  # noqa: N801 - used like a function
    """In this context the device is the current one, which is where Triton launches."""

    def __init__(self, device: torch.device) -> None:
        self._context: Any = None
        if device.type != "cpu":
            module = torch.get_device_module(device)
            if module.current_device() != device.index:
                self._context = module.device(device)

    def __enter__(self) -> None:
        if self._context is not None:
            self._context.__enter__()

    def __exit__(self, *exception: object) -> None:
        if self._context is not None:
            self._context.__exit__(*exception)


def _staged(words: int, device: torch.device) -> Tensor:
    pinned = device.type != "cpu"
    return torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=pinned)


def upload(array: npt.NDArray[Any], device: torch.device, kept: list[Any]) -> Tensor:
    """A copy of an array of 64-bit numbers on the device.

    In a capture the copying becomes part of the graph, so that its source goes to `kept`.
    """
    dtype = torch.float64 if array.dtype == np.float64 else torch.int64
    staged = _staged(array.size, device).view(dtype).view(array.shape)
    staged.numpy()[...] = array
    made = torch.empty_like(staged, device=device)
    made.copy_(staged, non_blocking=True)
    if is_capturing(device):
        kept += [staged, made]
    return made


class Uploaded(NamedTuple):
    """The device's copy of a mirror: all of it, its integers and its floating point numbers."""

    table: Tensor
    integers: Tensor
    floats: Tensor


class Mirror:
    """A table of integers and float64 numbers on the host, and its copy on a device.

    Attributes:
        integers, floats: the host's side, to be written to
        copy: the device's side
    """

    def __init__(self, integers: int, floats: int, device: torch.device) -> None:
        self._device = device
        self._host = np.zeros(integers + floats, np.int64)
        self.integers = self._host[:integers]
        self.floats = self._host[integers:].view(np.float64)
        self.copy = self._new_copy()
        self._sent = [b"", b""]
        self._spares: list[tuple[Tensor, Uploaded]] = []

    def _new_copy(self) -> Uploaded:
        table = torch.empty(len(self._host), dtype=torch.int64, device=self._device)
        count = len(self.integers)
        return Uploaded(table, table[:count], table[count:].view(torch.float64))

    def send(self) -> Uploaded:
        """The device's copy, brought up to date; nothing is copied that is there already."""
        count = len(self.integers)
        for half, part in enumerate((slice(0, count), slice(count, None))):
            now = self._host[part].tobytes()
            if now != self._sent[half]:
                staged = _staged(len(now) // 8, self._device)
                staged.numpy()[:] = self._host[part]
                self.copy.table[part].copy_(staged, non_blocking=True)
                self._sent[half] = now
        # during a capture no memory should have to be asked for
        while len(self._spares) < SPARES:
            self._spares.append((_staged(len(self._host), self._device), self._new_copy()))
        return self.copy

    def send_captured(self, kept: list[Any]) -> Uploaded:
        """A copy of its own for a graph: replays copy it anew, steps in between leave it alone."""
        if not self._spares:
            self._spares.append((_staged(len(self._host), self._device), self._new_copy()))
        staged, copy = self._spares.pop()
        staged.numpy()[:] = self._host
        copy.table.copy_(staged, non_blocking=True)
        kept += [staged, copy]
        return copy

    def tensors(self) -> list[Tensor]:
        """What lies on the device."""
        return [self.copy.table, *(copy.table for _, copy in self._spares)]
