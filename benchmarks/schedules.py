"""How long a step of a schedule takes, beside torch's of the same name, on 100 groups."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch.optim import lr_scheduler as torch_schedulers

import stepwell
from stepwell import lr_scheduler

GROUPS = 100
BAR = 3.0
STEPS = 50
# more steps than a row takes in the longest race
ENDLESS = 10_000_000


def _cosine(module: Any, optimizer: Any) -> Any:
    return module.CosineAnnealingLR(optimizer, ENDLESS)


def _one_cycle(module: Any, optimizer: Any) -> Any:
    return module.OneCycleLR(optimizer, 1.0, total_steps=ENDLESS)


def _sequence(module: Any, optimizer: Any) -> Any:
    parts = [module.LinearLR(optimizer, total_iters=10), _cosine(module, optimizer)]
    return module.SequentialLR(optimizer, parts, milestones=[10])


@dataclass(frozen=True)
class Schedules:
    """A row: a schedule, made of the classes of a module, on the AdamW of a library."""

    what: str
    make: Callable[[Any, Any], Any]
    library: Any

    def __str__(self) -> str:
        return f"{self.what} on {self.library.__name__}.AdamW"

    def measure(self, seconds: float) -> Stepped:
        """Race stepwell's class with torch's, each on an optimizer of its own."""
        rivals = {
            "stepwell": self.make(lr_scheduler, _optimizer(self.library)),
            "torch": self.make(torch_schedulers, _optimizer(self.library)),
        }
        times: dict[str, list[float]] = {name: [] for name in rivals}
        for scheduler in rivals.values():
            scheduler.optimizer.step()
        for _ in _rounds(seconds):
            for name, scheduler in rivals.items():
                times[name].append(_microseconds(scheduler))
        ours, theirs = (scheduler.get_last_lr() for scheduler in rivals.values())
        medians = {name: statistics.median(values) for name, values in times.items()}
        return Stepped(str(self), medians, wrong=not _alike(ours, theirs))


SCHEDULES = tuple(
    Schedules(what, make, library)
    for what, make in (
        ("CosineAnnealingLR", _cosine),
        ("OneCycleLR", _one_cycle),
        ("SequentialLR", _sequence),
    )
    for library in (torch.optim, stepwell)
)


@dataclass(frozen=True)
class Stepped:
    """Microseconds per step, medians of one race; `wrong`: the rates after it differ."""

    what: str
    medians: dict[str, float]
    wrong: bool

    @property
    def ratio(self) -> float:
        """How many of our steps fit into one of torch's."""
        return self.medians["torch"] / self.medians["stepwell"]

    def misses(self) -> list[str]:
        """What is wrong, or slower than it must be."""
        slow = [f"{self.ratio:.2f}x < {BAR:g}x"] if self.ratio < BAR else []
        return ["wrong rates"] if self.wrong else slow


def _microseconds(scheduler: Any) -> float:
    begin = time.perf_counter()
    for _ in range(STEPS):
        scheduler.step()
    return (time.perf_counter() - begin) / STEPS * 1e6


def _rounds(seconds: float) -> Iterator[None]:
    gc.collect()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        yield


def _optimizer(library: Any) -> Any:
    groups = [{"params": [torch.zeros(1)], "lr": 0.1 + i / 1000} for i in range(GROUPS)]
    return library.AdamW(groups)


def _alike(ours: list[float], theirs: list[float]) -> bool:
    # torch multiplies step by step: some 1e-16 per step, up to 1e5 steps
    return torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-9, atol=0)


def schedules_table(timings: Iterable[Stepped]) -> Table:
    """What was measured, and whether it is enough."""
    made = Table(title=f"microseconds per step of a schedule, {GROUPS} groups, medians")
    made.add_column("schedule")
    for name in ("stepwell", "torch", "vs torch"):
        made.add_column(name, justify="right")
    made.add_column("must reach")
    for timing in timings:
        missed = "; ".join(timing.misses())
        made.add_row(
            timing.what,
            *(f"{timing.medians[name]:,.1f}" for name in ("stepwell", "torch")),
            f"{timing.ratio:.2f}x",
            f"[red]{missed}[/red]" if missed else f"[green]{BAR:g}x[/green]",
        )
    return made


def saved(timing: Stepped) -> dict[str, Any]:
    """The same for the JSON file."""
    medians = {name: round(value, 2) for name, value in timing.medians.items()}
    return {
        "schedule": timing.what,
        "groups": GROUPS,
        "microseconds": medians,
        "missed": timing.misses(),
    }
