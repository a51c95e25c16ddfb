"""`--tune`: a step under other sizes of blocks and chunks, and other numbers of warps."""

from __future__ import annotations

import statistics
from itertools import product
from typing import Any
from unittest.mock import patch

import stepwell
from stepwell.backends import triton
from stepwell.native.triton_jit import OPTIONS

from .cases import Case
from .devices import Copy, Host
from .measure import sampler

__all__ = ["tune"]

CHOICES = {
    "CHUNK": (16_384, 32_768, 65_536),
    "BLOCK": (512, 1024, 2048, 4096),
    "num_warps": (2, 4, 8),
}


def tune(case: Case, machine: Host, copy: Copy) -> list[dict[str, Any]]:
    """A row for each choice, the fastest first."""
    params = case.params()
    rows = []
    for values in product(*CHOICES.values()):
        choice = dict(zip(CHOICES, values, strict=True))
        before = len(copy.times)
        microseconds = _measured(case, params, choice, machine, copy)
        share = case.gigabytes_per_second(microseconds) / copy.gigabytes_per_second(before)
        rows.append({**choice, "microseconds": microseconds, "share_of_copy": share})
        machine.release()
    return sorted(rows, key=lambda row: row["microseconds"])


def _measured(case: Case, params: Any, choice: dict[str, int], machine: Host, copy: Copy) -> float:
    with (
        patch.object(triton, "CHUNK", choice["CHUNK"]),
        patch.object(triton, "BLOCK", choice["BLOCK"]),
        patch.dict(OPTIONS, num_warps=choice["num_warps"]),
    ):
        step = case.optimizer(stepwell, params).step
        sample = sampler(step, "device", machine, copy)
        return statistics.median(sample() for _ in range(case.rounds))
