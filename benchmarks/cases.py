"""What is measured: tensors, rules and rivals, with what each row must reach."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

import stepwell

from .traffic import Traffic, traffic

__all__ = ["BEST", "RULES", "SGD", "SMALL", "Case", "Make", "Params", "rivals_of"]

Params = list[torch.nn.Parameter]
Make = Callable[..., torch.optim.Optimizer]
"""(params, lr=1e-3) -> optimizer"""

FLAGS: dict[str, dict[str, bool]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "default": {},
}
"""The rivals: torch's ways of doing the same, by what asks for them."""

BEST = "best"
"""Whichever rival is the fastest, among the `bars` of a case."""

SMALL = (1600, 40, 1600, 40, 1600, 120)
"""The six tensors of a small perceptron, 5,000 elements in all."""

SGD = {"momentum": 0.9}

RULES: dict[str, Mapping[str, Any]] = {
    "SGD": SGD,
    "Adam": {},
    "RMSprop": {},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "ASGD": {},
    "Rprop": {},
    "Adagrad": {},
}
"""Every rule beside AdamW that works per element and has a twin in torch, with its settings."""


@dataclass(frozen=True)
class Case:
    """One row: tensors of given sizes under one rule.

    `bars` are ratios that must be reached, by rival; `limit` is microseconds per step,
    `share_of_copy` of the bytes per second that a copy moves, and `share_of_yardstick` of those
    that another case's fused step by torch moves, which then takes turns with the contenders. On a
    GPU `clock` says whose time counts: the "host"'s, until the step returns, or the "device"'s.
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
    yardstick: Case | None = None
    share_of_yardstick: float | None = None
    is_limited_by_memory: bool = False
    is_rounded: bool = False
    """Whether torch computes parts of the step in bfloat16, whatever the dtype."""
    rounds: int = 7
    """How often each contender is measured at least."""
    steps_to_compare: int = 5
    shapes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """The shapes of tensors with this many elements, where they are not flat."""
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
            flat = torch.randn(size, generator=generator, device=self.device).to(self.dtype)
            return flat.view(self.shapes.get(size, (size,)))

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
        made: dict[str, Make] = {"stepwell": self._make(stepwell, {})}
        return made | {name: self._make(torch.optim, FLAGS[name]) for name in self.rivals}

    @property
    def has_ways(self) -> bool:
        """Whether torch has more than one way of doing it."""
        return "foreach" in _arguments(self.rule)

    def loop(self) -> Make:
        """Torch's plainest way of doing it."""
        return self._make(torch.optim, {"foreach": False} if self.has_ways else {})

    def _make(self, package: Any, flags: dict[str, Any]) -> Make:
        return lambda params, lr=1e-3: self.optimizer(package, params, lr, **flags)


def rivals_of(rule: str) -> tuple[str, ...]:
    """The ways that torch offers for a rule, besides its plain loop."""
    return tuple(name for name in FLAGS if name in _arguments(rule))


def _arguments(rule: str) -> Mapping[str, Any]:
    return inspect.signature(getattr(torch.optim, rule)).parameters
