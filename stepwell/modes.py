"""Modes of torch that the code around a step may be in, and that must not change its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["in_autocast", "undisturbed", "without_autocast"]


@contextmanager
def undisturbed(values: Iterable[Any]) -> Iterator[None]:
    """Work on tensors without autograd and without inference mode, whatever is around it.

    A tensor that was made in inference mode can be written to in inference mode only: if there is
    one among the values, that mode is on.
    """
    is_inference = any(isinstance(value, Tensor) and value.is_inference() for value in values)
    with torch.inference_mode(is_inference), torch.no_grad():
        yield


def in_autocast(device: torch.device) -> bool:
    """Whether autocast is on, for work on this device."""
    kind = device.type
    # one that has none, as "meta", raises an error if it is asked whether it is on
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Multiply matrices in their own precision, whatever autocast says."""
    return torch.autocast(device.type, enabled=False) if in_autocast(device) else nullcontext()
