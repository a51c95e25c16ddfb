"""What is measured: tensors, rules and rivals, with what each row must reach."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

import stepwell

from .traffic import Traffic, traffic

Params = list[torch.nn.Parameter]
Make = Callable[..., torch.optim.Optimizer]
"""(params, lr=1e-3) -> optimizer"""


@dataclass(frozen=True)
class Case:
    """One row: tensors of given sizes under one rule.

    `bars` are ratios that must be reached, by rival; `limit` is microseconds per step, and
    `share_of_copy` of the bytes per second that a copy moves. On a GPU `clock` says whose time
    counts: the "host"'s, until the step returns, or the "device"'s.
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
    share_of_copy: float | None = None
    is_limited_by_memory: bool = False
    missing: float = 0.0
    """The share of gradients that is missing, another one at every step."""
    device: str = "cpu"
    clock: str = "host"

    @cached_property
    def traffic(self) -> Traffic:
        """The bytes that a step of stepwell's moves and holds per element."""
        return traffic(self.rule, self.dtype, self.settings)

    def gigabytes_per_second(self, microseconds: float) -> float:
        """What a step moves, counting each read and write of an element that ours makes once."""
        return self.traffic.moved * sum(self.sizes) / microseconds / 1e3

    def params(self) -> Params:
        """Parameters with gradients, the same at every call."""
        generator = torch.Generator(self.device).manual_seed(0)

        def drawn(size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=self.device).to(self.dtype)

        made = []
        for size in self.sizes:
            made.append(torch.nn.Parameter(drawn(size)))
            made[-1].grad = drawn(size)
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
                is_limited_by_memory=large,
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
    *_rows("AdamW", torch.float32, {}, ADAMW_BARS, [10.0, 500.0, None, None, None]),
    *OTHER_ROWS,
    *_rows("SGD", torch.float32, SGD, SGD_BARS, [None] * 5),
    *_rows("AdamW", torch.bfloat16, {}, ADAMW_BARS, [10.0, 500.0, None, None, None]),
    # torch's fused SGD leaves most bfloat16 parameters as they are: pytorch issue 191763
    *_rows("SGD", torch.bfloat16, SGD, SGD_BARS, [None] * 5),
]


# On a GPU


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

RULES: dict[str, Mapping[str, Any]] = {"SGD": SGD, "Adam": {}}
"""Every rule beside AdamW that works per element and has a twin in torch, with its settings."""

PER_RULE = {"foreach": 2.0}
SHARE = 0.85


def gpu_cases(device: str, sizes: Sizes) -> list[Case]:
    """The rows of a GPU, what matters most first."""

    def row(rule: str, work: tuple[int, ...], clock: str, **more: Any) -> Case:
        name = _spelt(work)
        return Case(name, rule, work, device=device, clock=clock, rivals=_rivals(rule), **more)

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


def _rivals(rule: str) -> tuple[str, ...]:
    known = inspect.signature(getattr(torch.optim, rule)).parameters
    return tuple(name for name in ("fused", "foreach") if name in known)


def _spelt(sizes: tuple[int, ...]) -> str:
    if len(set(sizes)) == 1:
        return f"{len(sizes):,} x {sizes[0]:,}"
    return f"{len(sizes):,} tensors, {sum(sizes):,} elements"
