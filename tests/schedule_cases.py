"""The table of schedules: every class with several settings, for all tests about them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import SGD, Optimizer, swa_utils
from torch.optim import lr_scheduler as torch_schedulers

RATES = (0.3, 0.0, 7.0)


class Decay:
    """An object that is called, whose attributes a schedule saves."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, step: int) -> float:
        return self.rate**step


@dataclass(frozen=True)
class Case:
    """A schedule: its class, its arguments, and what is known about it.

    `make` builds what stands for `schedulers` of a composite, given the module of the classes.
    `chains`: a rate changed by hand is kept.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    chains: bool = True
    parts: Callable[[Any, Optimizer], dict[str, Any]] | None = None
    rates: tuple[float, ...] = RATES
    last: int | None = None

    @property
    def label(self) -> str:
        shown = ", ".join(f"{key}={_shown(value)}" for key, value in self.arguments.items())
        return f"{self.name}({shown})"

    def make(self, module: Any, held: Optimizer, **more: Any) -> Any:
        """The schedule as a class of this module, on this optimizer."""
        if self.name == "SWALR" and module is torch_schedulers:
            module = swa_utils
        arguments = self.arguments if self.parts is None else self.parts(module, held)
        if self.name == "ChainedScheduler":
            return module.ChainedScheduler(**arguments, **more)
        return getattr(module, self.name)(held, **arguments, **more)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return getattr(value, "__name__", type(value).__name__) if callable(value) else repr(value)


def optimizer(*rates: Any, kind: Any = SGD, **arguments: Any) -> Optimizer:
    """An optimizer with one group for each rate."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates]
    return kind(groups, lr=1.0, **arguments)


def sequence(*parts: tuple[str, dict[str, Any]], milestones: list[int]) -> Any:
    def make(module: Any, held: Optimizer) -> dict[str, Any]:
        made = [getattr(module, name)(held, **arguments) for name, arguments in parts]
        return {"schedulers": made, "milestones": milestones}

    return make


def chain(*parts: tuple[str, dict[str, Any]]) -> Any:
    def make(module: Any, held: Optimizer) -> dict[str, Any]:
        return {"schedulers": [getattr(module, name)(held, **more) for name, more in parts]}

    return make


def wobble(step: int) -> float:
    return 1.0 + 0.5 * math.sin(step)


def shrink(step: int) -> float:
    return 0.99 + 0.02 * math.sin(step)


CASES = (
    Case("LambdaLR", {"lr_lambda": wobble}, chains=False),
    Case("LambdaLR", {"lr_lambda": [wobble, Decay(0.99), Decay(0.9)]}, chains=False),
    Case("MultiplicativeLR", {"lr_lambda": shrink}),
    Case("MultiplicativeLR", {"lr_lambda": [shrink, shrink, wobble]}),
    Case("StepLR", {"step_size": 1}),
    Case("StepLR", {"step_size": 7, "gamma": 0.9}),
    Case("StepLR", {"step_size": 100, "gamma": 0}),
    # halves and quarters of a number of epochs are floats
    Case("StepLR", {"step_size": 15.0, "gamma": 0.9}),
    Case("MultiStepLR", {"milestones": [3.0, 10.0], "gamma": 0.5}),
    Case("MultiStepLR", {"milestones": [3, 10, 10, 200]}),
    Case("MultiStepLR", {"milestones": [0, 1], "gamma": 1.5}),
    Case("MultiStepLR", {"milestones": []}),
    Case("ConstantLR"),
    Case("ConstantLR", {"factor": 0.7, "total_iters": 1}),
    Case("ConstantLR", {"factor": 1, "total_iters": 400}),
    Case("LinearLR"),
    Case("LinearLR", {"start_factor": 0.001, "total_iters": 500}),
    Case("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 300}),
    Case("LinearLR", {"start_factor": 1, "end_factor": 0.3, "total_iters": 7}),
    Case("ExponentialLR", {"gamma": 0.99}),
    Case("ExponentialLR", {"gamma": 1.001}),
    Case("ExponentialLR", {"gamma": 0}),
    Case("PolynomialLR"),
    Case("PolynomialLR", {"total_iters": 600, "power": 0.9}),
    Case("PolynomialLR", {"total_iters": 80, "power": 3}),
    Case("CosineAnnealingLR", {"T_max": 1000}),
    Case("CosineAnnealingLR", {"T_max": 1100, "eta_min": 0.01}),
    Case("CosineAnnealingLR", {"T_max": 1e3, "eta_min": 0.5}),
    Case("CosineAnnealingWarmRestarts", {"T_0": 10}, chains=False),
    Case("CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2, "eta_min": 0.01}, chains=False),
    Case("CosineAnnealingWarmRestarts", {"T_0": 1, "T_mult": 3}, chains=False),
    Case("CyclicLR", {"base_lr": 0.1, "max_lr": 0.7, "step_size_up": 30}, chains=False),
    Case(
        "CyclicLR",
        {
            "base_lr": [0.1, 0.2, 0.0],
            "max_lr": [0.7, 0.2, 3.0],
            "step_size_up": 7,
            "step_size_down": 11,
            "mode": "triangular2",
            "base_momentum": 0.5,
        },
        chains=False,
    ),
    Case(
        "CyclicLR",
        {"base_lr": 0.1, "max_lr": 0.7, "step_size_up": 9, "mode": "exp_range", "gamma": 0.999},
        chains=False,
    ),
    Case(
        "CyclicLR", {"base_lr": 0.1, "max_lr": 0.7, "step_size_up": 5, "step_size_down": 0}, False
    ),
    Case(
        "CyclicLR",
        {"base_lr": 0.1, "max_lr": 0.7, "scale_fn": Decay(0.99), "cycle_momentum": False},
        chains=False,
    ),
    Case("OneCycleLR", {"max_lr": 0.4, "total_steps": 1001}, chains=False, last=1000),
    Case(
        "OneCycleLR",
        {
            "max_lr": [0.4, 0.5, 0.6],
            "epochs": 10,
            "steps_per_epoch": 101,
            "three_phase": True,
            "anneal_strategy": "linear",
            "max_momentum": 0.99,
            "div_factor": 10.0,
        },
        chains=False,
        last=1009,
    ),
    Case(
        "OneCycleLR",
        {"max_lr": 0.4, "total_steps": 1500, "pct_start": 0.0, "cycle_momentum": False},
        chains=False,
        last=1499,
    ),
    # torch leaves the last phase out then
    Case(
        "OneCycleLR",
        {"max_lr": 0.4, "total_steps": 1100, "pct_start": 0.7, "three_phase": True},
        chains=False,
        last=1099,
    ),
    Case("SWALR", {"swa_lr": 0.05}),
    Case("SWALR", {"swa_lr": [0.05, 0.1, 9.0], "anneal_epochs": 700, "anneal_strategy": "linear"}),
    Case("SWALR", {"swa_lr": 0.05, "anneal_epochs": 0}),
    Case(
        "SequentialLR",
        parts=sequence(
            ("LinearLR", {"total_iters": 100}),
            ("CosineAnnealingLR", {"T_max": 900}),
            milestones=[100],
        ),
    ),
    Case(
        "SequentialLR",
        parts=sequence(
            ("ConstantLR", {"factor": 0.1, "total_iters": 10}),
            ("ExponentialLR", {"gamma": 0.9}),
            ("LambdaLR", {"lr_lambda": wobble}),
            ("StepLR", {"step_size": 50, "gamma": 0.7}),
            milestones=[3, 20, 400],
        ),
    ),
    Case(
        "ChainedScheduler",
        parts=chain(("ConstantLR", {"total_iters": 20}), ("ExponentialLR", {"gamma": 0.99})),
    ),
    Case(
        "ChainedScheduler",
        parts=chain(
            ("LinearLR", {"total_iters": 20}),
            ("CosineAnnealingLR", {"T_max": 1200, "eta_min": 0.01}),
            ("MultiplicativeLR", {"lr_lambda": shrink}),
        ),
    ),
    Case(
        "ChainedScheduler",
        parts=chain(
            ("LambdaLR", {"lr_lambda": wobble}), ("StepLR", {"step_size": 3, "gamma": 0.9})
        ),
    ),
)
