"""What is measured: tensors, rules and rivals, with what each row must reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import stepwell

Params = list[torch.nn.Parameter]
Make = Callable[..., torch.optim.Optimizer]
"""(params, lr=1e-3) -> optimizer"""


@dataclass(frozen=True)
class Case:
    """One row: tensors of given sizes under one rule.

    `bars` are ratios that must be reached, by rival; `limit` is microseconds per step.
    """

    work: str
    rule: str
    sizes: tuple[int, ...]
    groups: int = 1
    dtype: torch.dtype = torch.float32
    settings: Mapping[str, Any] = field(default_factory=dict)
    rivals: tuple[str, ...] = ("fused", "default")
    bars: Mapping[str, float] = field(default_factory=dict)
    limit: float | None = None
    bytes_per_element: int = 0
    missing: float = 0.0
    """The share of gradients that is missing, another one at every step."""

    def params(self) -> Params:
        """Parameters with gradients, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        made = []
        for size in self.sizes:
            values, grad = torch.randn((2, size), generator=generator).to(self.dtype)
            made.append(torch.nn.Parameter(values))
            made[-1].grad = grad.clone()
        return made

    def optimizer(self, package: Any, params: Params, lr: float = 1e-3, **flags: Any) -> Any:
        """The rule of a package on these parameters, in as many groups as the case has."""
        per_group = -(-len(params) // self.groups)
        groups = [
            {"params": params[i * per_group : (i + 1) * per_group], "lr": lr * (1 + i / 100)}
            for i in range(self.groups)
        ]
        return getattr(package, self.rule)(groups, **self.settings, **flags)

    def contenders(self) -> dict[str, Make]:
        """What is raced: stepwell as it comes, and torch's ways of doing the same."""
        flags = {"fused": {"fused": True}, "foreach": {"foreach": True}, "default": {}}
        made: dict[str, Make] = {"stepwell": self._make(stepwell, {})}
        return made | {name: self._make(torch.optim, flags[name]) for name in self.rivals}

    def _make(self, package: Any, flags: dict[str, Any]) -> Make:
        return lambda params, lr=1e-3: self.optimizer(package, params, lr, **flags)


SMALL = (1600, 40, 1600, 40, 1600, 120)
"""The six tensors of a small perceptron, 5,000 elements in all."""

MEDIUM = (4096,) * 200
MANY = (1000,) * 1000
LARGE = (50_000_000,)
PIECES = (500_000,) * 100

SGD = {"momentum": 0.9}
AT_MEMORY_LIMIT = {"fused": 0.97}


def _rows(
    rule: str,
    dtype: torch.dtype,
    settings: Mapping[str, Any],
    bars: list[dict[str, float]],
    limits: list[float | None],
    size: int,
) -> list[Case]:
    works = [
        ("6 tensors, 5,000 elements", SMALL, 1),
        ("200 x 4,096", MEDIUM, 1),
        ("1,000 x 1,000 in 100 groups", MANY, 100),
        ("1 x 50 M", LARGE, 1),
        ("100 x 0.5 M", PIECES, 1),
    ]
    made = []
    for (work, sizes, groups), bar, limit in zip(works, bars, limits, strict=True):
        large = sum(sizes) > 10_000_000
        made.append(
            Case(
                work,
                rule,
                sizes,
                groups,
                dtype,
                settings,
                # the loop says nothing new where memory is the limit, and takes long
                ("fused",) if large else ("fused", "default"),
                bar,
                limit,
                size if large else 0,
            )
        )
    return made


ADAMW_BARS = [
    {"fused": 5.0, "default": 16.0},
    {"fused": 2.4},
    {"fused": 4.0, "default": 18.0},
    AT_MEMORY_LIMIT,
    AT_MEMORY_LIMIT,
]
SGD_BARS = [{"fused": 3.0}, {"fused": 3.0}, {"fused": 3.0}, AT_MEMORY_LIMIT, AT_MEMORY_LIMIT]

# no bars: what the table above leaves out
OTHER_ROWS = [
    Case("1,000 x 1,000 in 1,000 groups", "AdamW", MANY, 1000),
    Case("200 x 4,096, every other gradient missing", "AdamW", MEDIUM, missing=0.5),
]

CASES = [
    *_rows("AdamW", torch.float32, {}, ADAMW_BARS, [10.0, 500.0, None, None, None], 28),
    *OTHER_ROWS,
    *_rows("SGD", torch.float32, SGD, SGD_BARS, [None] * 5, 20),
    *_rows("AdamW", torch.bfloat16, {}, ADAMW_BARS, [10.0, 500.0, None, None, None], 14),
    # torch's fused SGD leaves most bfloat16 parameters as they are: pytorch issue 191763
    *_rows("SGD", torch.bfloat16, SGD, SGD_BARS, [None] * 5, 10),
]
