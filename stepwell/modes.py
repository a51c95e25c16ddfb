"""Modes of torch that the code around a step may be in, and that must not change its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_around", "is_inference", "undisturbed", "without_autocast"]


def is_inference(tensors: Iterable[Tensor]) -> bool:
    """Return whether a tensor was made in inference mode, so only that mode may write to it."""
    return any(map(Tensor.is_inference, tensors))


@contextmanager
def undisturbed(inference: bool = False) -> Iterator[None]:
    """Work on tensors without autograd, and in inference mode or not, whatever is around it."""
    with torch.inference_mode(inference), torch.no_grad():
        yield


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Multiply matrices in their own precision, whatever autocast says."""
    return torch.autocast(device.type, enabled=False) if _in_autocast(device) else nullcontext()


def as_around(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A function that runs in the autocast of now, on weights as they are when it is called."""
    if not _in_autocast(device):
        return function
    kind, caches = device.type, torch.is_autocast_cache_enabled()
    dtype = torch.get_autocast_dtype(kind)

    def recast() -> Any:
        # autocast keeps copies of weights, which may have moved since
        torch.clear_autocast_cache()
        with torch.autocast(kind, dtype=dtype, cache_enabled=caches):
            return function()

    return recast


def _in_autocast(device: torch.device) -> bool:
    kind = device.type
    # one that has none, as "meta", raises an error if it is asked whether it is on
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
