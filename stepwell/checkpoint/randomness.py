"""The generators of random numbers: what they would draw next, saved and restored."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from .header import CheckpointError

__all__ = ["check_random_state", "random_state", "set_random_state"]


def random_state() -> dict[str, Any]:
    """The states of the generators of Python, numpy and torch, on all devices."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states(),
    }


def _cuda_states() -> list[torch.Tensor]:
    # a process that has not touched a device must not start it
    began = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if began else []


def check_random_state(state: Any) -> None:
    """Check that `set_random_state` could take these.

    Raises:
        CheckpointError: it could not
    """
    try:
        if not isinstance(state["python"], tuple) or not isinstance(state["cuda"], list):
            raise TypeError("they must be a tuple, and a list of those of devices")
        random.Random().setstate(state["python"])
        np.random.RandomState().set_state(_numpys(state["numpy"]))
        torch.Generator().set_state(state["torch"])
        for each in state["cuda"] if torch.cuda.is_available() else ():
            torch.Generator("cuda").set_state(each)
    # they raise whatever comes up in the middle of what is none
    except Exception as error:
        raise CheckpointError(f"has no states of random number generators: {error}") from error


def _numpys(state: Any) -> Any:
    kind, keys, *rest = state
    return kind, keys.numpy(), *rest


def set_random_state(state: Any) -> None:
    """Have all generators go on from these states."""
    random.setstate(state["python"])
    np.random.set_state(_numpys(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
