"""Who races: every rule once with torch.optim and once with stepwell, everything else equal."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .task import Task

RIVAL = "torch.optim"
OURS = "stepwell"


@dataclass(frozen=True)
class Schedule:
    """A scheduler by the name of its class, stepped once per epoch."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """An optimizer by the name of its class, with hyperparameters and a schedule.

    Attributes:
        title: what tables and pictures call it
        name: the class, the same in every library
        lr: the rate of tasks that do not name their own
        options: the other hyperparameters
        schedule: how the rate changes from epoch to epoch, if it does
    """

    title: str
    name: str
    lr: float
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule | None = None


@dataclass(frozen=True)
class Contender:
    """One rule as one library implements it."""

    rule: Rule
    library: str

    @property
    def title(self) -> str:
        """Rule and library, as the progress shows them."""
        return f"{self.rule.title} · {self.library}"

    def optimizer(self, task: Task, model: nn.Module) -> Optimizer:
        """A fresh optimizer of the library for the task's model."""
        make = getattr(importlib.import_module(self.library), self.rule.name)
        lr = task.rates.get(self.rule.name, self.rule.lr)
        optimizer: Optimizer = make(task.groups(model, lr), lr=lr, **self.rule.options)
        return optimizer

    def scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """A fresh scheduler of the library, if the rule has one."""
        schedule = self.rule.schedule
        if schedule is None:
            return None
        make = getattr(importlib.import_module(f"{self.library}.lr_scheduler"), schedule.name)
        scheduler: LRScheduler = make(optimizer, **schedule.options)
        return scheduler


def rules(epochs: int) -> list[Rule]:
    """The rules of the default race: AdamW, and SGD with momentum whose rate falls twice."""
    fall = Schedule("StepLR", {"step_size": max(1, epochs // 3), "gamma": 0.3})
    return [
        Rule("AdamW", "AdamW", lr=1e-3, options={"weight_decay": 1e-2}),
        Rule("SGD + StepLR", "SGD", lr=1e-2, options={"momentum": 0.9}, schedule=fall),
    ]
