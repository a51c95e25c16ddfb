"""The rows of a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from .cases import BEST, RULES, SGD, SMALL, Case, rivals_of

__all__ = ["CASES", "OTHER_RULES"]

Bars = Mapping[str, float]

MANY = (1000,) * 1000
MEDIUM = (4096,) * 200
PIECES = (500_000,) * 100

WORKS = (
    ("6 tensors, 5,000 elements", SMALL, 1),
    ("200 x 4,096", MEDIUM, 1),
    ("1,000 x 1,000 in 100 groups", MANY, 100),
    ("1 x 50 M", (50_000_000,), 1),
    ("100 x 0.5 M", PIECES, 1),
)


def _rows(
    rule: str,
    dtype: torch.dtype,
    settings: Mapping[str, Any],
    bars: Sequence[Bars],
    limits: Sequence[float | None],
) -> list[Case]:
    made = []
    for (work, sizes, groups), bar, limit in zip(WORKS, bars, limits, strict=True):
        bound = sum(sizes) > 10_000_000
        # the loop says nothing new where memory is the limit, and takes long
        rivals = ("fused",) if bound else ("fused", "default")
        case = Case(work, rule, sizes, groups, dtype, settings, rivals, bar, limit)
        made.append(replace(case, is_limited_by_memory=bound))
    return made


AT_MEMORY_LIMIT: Bars = {"fused": 0.97}
ADAMW_BARS: Sequence[Bars] = (
    {"fused": 5.0, "default": 16.0},
    {"fused": 2.4},
    {"fused": 4.0, "default": 18.0},
    AT_MEMORY_LIMIT,
    AT_MEMORY_LIMIT,
)
ADAMW_LIMITS = (10.0, 500.0, None, None, None)
SGD_BARS: Sequence[Bars] = (*({"fused": 3.0},) * 3, AT_MEMORY_LIMIT, AT_MEMORY_LIMIT)
NO_LIMITS = (None,) * len(WORKS)

# no bars: what the rows of `WORKS` leave out
UNUSUAL = [
    Case("1,000 x 1,000 in 1,000 groups", "AdamW", MANY, 1000),
    Case("200 x 4,096, every other gradient missing", "AdamW", MEDIUM, missing=0.5),
]

# where torch has a fused kernel, that is the best of its ways by far
OTHER_BARS: Mapping[str, tuple[Bars, Bars]] = {"Adagrad": ({"fused": 3.0}, {"fused": 3.0})}
BARS: tuple[Bars, Bars] = ({BEST: 7.0}, {BEST: 6.0})


def _other_rows(rule: str) -> list[Case]:
    """Three works under a rule for which torch has no fused kernel on a CPU, with one exception."""
    rivals = (*rivals_of(rule), "default")
    few, many = OTHER_BARS.get(rule, BARS)
    return [
        Case("6 tensors, 5,000 elements", rule, SMALL, rivals=rivals, bars=few, limit=15.0),
        Case("1,000 x 1,000", rule, MANY, rivals=rivals, bars=many),
        Case(
            "100 x 0.5 M",
            rule,
            PIECES,
            rivals=rivals,
            is_limited_by_memory=True,
            yardstick=Case("100 x 0.5 M", "AdamW", PIECES),
            share_of_yardstick=0.9,
        ),
    ]


OTHER_RULES = tuple(rule for rule in RULES if rule not in ("SGD", "Adam"))

MATRICES = {256 * 256: (256, 256), 1024 * 256: (1024, 256)}
MUON = Case(
    "48 x 256 x 256 and 12 x 1,024 x 256",
    "Muon",
    (256 * 256,) * 48 + (1024 * 256,) * 12,
    shapes=MATRICES,
    rivals=("default",),
    bars={"default": 1.3},
    is_rounded=True,
    # torch's takes seconds per step where a CPU has no instructions for bfloat16
    rounds=3,
    steps_to_compare=1,
)

# no bars: how much the rows and columns of matrices cost, beside torch's two ways
ADAFACTOR = [
    # torch adds up a column in float32, and is 2e-5 off the formula after five steps
    Case(work, "Adafactor", sizes, shapes=shapes, rivals=("foreach", "default"), is_rounded=True)
    for work, sizes, shapes in (
        ("1,000 x 32 x 32", (1024,) * 1000, {1024: (32, 32)}),
        ("20 x 1,000 x 1,000", (1_000_000,) * 20, {1_000_000: (1000, 1000)}),
    )
]

CASES = [
    *_rows("AdamW", torch.float32, {}, ADAMW_BARS, ADAMW_LIMITS),
    *UNUSUAL,
    *_rows("SGD", torch.float32, SGD, SGD_BARS, NO_LIMITS),
    *_rows("AdamW", torch.bfloat16, {}, ADAMW_BARS, ADAMW_LIMITS),
    # torch's fused SGD leaves most bfloat16 parameters as they are: pytorch issue 191763
    *_rows("SGD", torch.bfloat16, SGD, SGD_BARS, NO_LIMITS),
    *(case for rule in OTHER_RULES for case in _other_rows(rule)),
    *ADAFACTOR,
    MUON,
]
