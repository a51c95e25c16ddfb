"""The rows of a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cases import RULES, SMALL, Case, rivals_of

__all__ = ["FULL", "TINY", "Sizes", "gpu_cases", "resized"]


@dataclass(frozen=True)
class Sizes:
    """How large the rows of a GPU are.

    `first_steps` are the flags of AdamW whose first step is timed, each in so many `processes`.
    """

    model: tuple[int, ...]
    many: tuple[int, ...]
    small: tuple[int, ...]
    copy_bytes: int
    first_steps: tuple[Mapping[str, bool], ...]
    processes: int


def _model(total: int) -> tuple[int, ...]:
    """300 tensors as in a language model, the last one so large that this is the total."""
    width = 1776
    attention = (3 * width * width, 3 * width, width * width, width)
    perceptron = (4 * width * width, 4 * width, 4 * width * width, width)
    layers = (*attention, *perceptron, *(width,) * 4) * 24
    sizes = (50_257 * width, 512 * width, *layers, width, width, 1, 3, 7, 127, 1001, 4097, 33_333)
    return (*sizes, total - sum(sizes))


FULL = Sizes(
    _model(1_000_000_000), (10_000,) * 1000, SMALL, 8_000_000_000, ({}, {"fused": True}), 3
)
TINY = Sizes((40, 1, 1031), (5,) * 4, (3, 2), 1 << 16, ({},), 1)
"""For Triton's interpreter, which takes a millisecond per operation."""

PER_RULE = {"foreach": 2.0}
SHARE = 0.85


def gpu_cases(device: str, sizes: Sizes) -> list[Case]:
    """The rows of a GPU, what matters most first."""

    def row(rule: str, work: tuple[int, ...], clock: str, **more: Any) -> Case:
        name = _spelt(work)
        return Case(name, rule, work, device=device, clock=clock, rivals=rivals_of(rule), **more)

    bound: dict[str, Any] = {"is_limited_by_memory": True, "share_of_copy": SHARE}
    limit = 7000.0 * sum(sizes.model) / 1e9
    host_bars: list[tuple[tuple[int, ...], dict[str, float], float | None]] = [
        (sizes.many, {"fused": 3.0}, 600.0),
        (sizes.small, {"fused": 2.0}, None),
    ]
    made = [row("AdamW", sizes.model, "device", bars={"fused": 1.0}, limit=limit, **bound)]
    for work, bars, host_limit in host_bars:
        made.append(row("AdamW", work, "host", bars=bars, limit=host_limit))
        made.append(row("AdamW", work, "device"))
    made.append(row("AdamW", sizes.model, "device", dtype=torch.bfloat16, **bound))
    for rule, settings in RULES.items():
        made.append(row(rule, sizes.model, "device", settings=settings, bars=PER_RULE, **bound))
    return made


def resized(case: Case, scale: float) -> Case:
    """The row with tensors of this share of their sizes, and of the time that they may take."""
    sizes = tuple(max(1, round(size * scale)) for size in case.sizes)
    limit = None if case.limit is None else case.limit * sum(sizes) / sum(case.sizes)
    return replace(case, work=_spelt(sizes), sizes=sizes, limit=limit)


def _spelt(sizes: tuple[int, ...]) -> str:
    if len(set(sizes)) == 1:
        return f"{len(sizes):,} x {sizes[0]:,}"
    return f"{len(sizes):,} tensors, {sum(sizes):,} elements"
