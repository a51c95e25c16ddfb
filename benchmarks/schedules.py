"""How long a step of a schedule takes, beside torch's of the same name, on 100 groups."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch.optim import lr_scheduler as torch_schedulers

from stepwell import lr_scheduler

GROUPS = 100
BAR = 3.0
STEPS = 50
# more steps than a row takes in the longest race
ENDLESS = 10_000_000


@dataclass(frozen=True)
class Schedules:
    """A row: how a schedule is made of the classes of a module."""

    what: str
    make: Callable[[Any, Any], Any]


def _sequence(module: Any, optimizer: Any) -> Any:
    parts = [
        module.LinearLR(optimizer, total_iters=10),
        module.CosineAnnealingLR(optimizer, ENDLESS),
    ]
    return module.SequentialLR(optimizer, parts, milestones=[10])


SCHEDULES = (
    Schedules("CosineAnnealingLR", lambda module, opt: module.CosineAnnealingLR(opt, ENDLESS)),
    Schedules("OneCycleLR", lambda module, opt: module.OneCycleLR(opt, 1.0, total_steps=ENDLESS)),
    Schedules("SequentialLR", _sequence),
)


@dataclass(frozen=True)
class Timing:
    """Microseconds per step, medians of one race.

    `wrong`: the rates after the race differ.
    """

    what: str
    stepwell: float
    torch: float
    wrong: bool

    @property
    def ratio(self) -> float:
        return self.torch / self.stepwell

    def misses(self) -> bool:
        return self.wrong or self.ratio < BAR


def measure(row: Schedules, seconds: float, library: Any = torch.optim) -> Timing:
    """Race stepwell's schedule with torch's, both on the AdamW of one library."""
    rivals = {
        "stepwell": row.make(lr_scheduler, _optimizer(library.AdamW)),
        "torch": row.make(torch_schedulers, _optimizer(library.AdamW)),
    }
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for scheduler in rivals.values():
        scheduler.optimizer.step()
    for _ in _rounds(seconds):
        for name, scheduler in rivals.items():
            begin = time.perf_counter()
            for _ in range(STEPS):
                scheduler.step()
            times[name].append((time.perf_counter() - begin) / STEPS * 1e6)
    ours, theirs = (scheduler.get_last_lr() for scheduler in rivals.values())
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Timing(f"{row.what}, {library.__name__}", **medians, wrong=not _alike(ours, theirs))


def _rounds(seconds: float) -> Iterator[None]:
    gc.collect()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        yield


def _optimizer(kind: Any) -> Any:
    groups = [{"params": [torch.zeros(1)], "lr": 0.1 + i / 1000} for i in range(GROUPS)]
    return kind(groups)


def _alike(ours: list[float], theirs: list[float]) -> bool:
    # torch multiplies step by step: some 1e-16 per step, up to 1e5 steps
    return torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-9, atol=0)


def table(timings: list[Timing]) -> Table:
    """What was measured, and whether it is enough."""
    made = Table(title=f"microseconds per step of a schedule, {GROUPS} groups, medians")
    made.add_column("schedule")
    for name in ("stepwell", "torch", "vs torch"):
        made.add_column(name, justify="right")
    made.add_column("must reach")
    for timing in timings:
        colour = "red" if timing.misses() else "green"
        made.add_row(
            timing.what,
            "wrong" if timing.wrong else f"{timing.stepwell:,.1f}",
            f"{timing.torch:,.1f}",
            f"{timing.ratio:.2f}x",
            f"[{colour}]{BAR:g}x[/{colour}]",
        )
    return made


def rows(timings: list[Timing]) -> list[dict[str, Any]]:
    """The same for the JSON file."""
    return [
        {
            "what": timing.what,
            "groups": GROUPS,
            "microseconds": {
                "stepwell": round(timing.stepwell, 2),
                "torch": round(timing.torch, 2),
            },
            "missed": timing.misses(),
        }
        for timing in timings
    ]
