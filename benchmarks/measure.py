"""Measuring side by side: contenders take turns, medians count, wrong numbers have no speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cases import Case, Params

STEPS_TO_COMPARE = 5


@dataclass(frozen=True)
class Result:
    """Medians in microseconds per step, by contender; `error` says why there are none."""

    case: Case
    medians: dict[str, float]
    error: str | None = None

    def ratio(self, rival: str) -> float:
        """How many of our steps fit into one of the rival's."""
        return self.medians[rival] / self.medians["stepwell"]

    @property
    def gigabytes_per_second(self) -> float:
        """What our step moves, counting each read and write of an element once."""
        elements = sum(self.case.sizes)
        return self.case.bytes_per_element * elements / self.medians["stepwell"] / 1e3

    def misses(self) -> list[str]:
        """What was to be reached and was not."""
        missed = [
            f"{self.ratio(rival):.2f}x {rival}, not {bar}x"
            for rival, bar in self.case.bars.items()
            if self.ratio(rival) < bar
        ]
        limit = self.case.limit
        if limit is not None and self.medians["stepwell"] > limit:
            missed.append(f"{self.medians['stepwell']:.1f} us, not {limit:g}")
        return missed


def measure(case: Case, seconds: float) -> Result:
    """Race the contenders of a case for about this long, after comparing their numbers."""
    error = wrong_numbers(case)
    if error is not None:
        return Result(case, {}, error)
    steps = {name: _stepper(make(case.params())) for name, make in case.contenders().items()}
    rounds = {name: _calls_per_round(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["stepwell"]) < 7:
        for name, step in steps.items():
            times[name].append(_time(step, rounds[name]))
    return Result(case, {name: statistics.median(found) for name, found in times.items()})


def _stepper(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    optimizer.step()
    return optimizer.step


def _calls_per_round(step: Callable[[], object]) -> int:
    # a round long enough for the clock, short enough that all contenders see the same machine
    step()
    return max(1, min(200, int(2000 / max(_time(step, 1), 1))))


def _time(step: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls * 1e6


def wrong_numbers(case: Case) -> str | None:
    """Why stepwell's parameters are not those of the rival after a few steps, or None."""
    contenders = case.contenders()
    ours = _after_steps(case, contenders.pop("stepwell"))
    for rival, make in contenders.items():
        for index, (a, b) in enumerate(zip(ours, _after_steps(case, make), strict=True)):
            # torch rounds bfloat16 at every operation of its loop, each time by half an ULP
            rtol, atol = (3e-2, 3e-2) if case.dtype is torch.bfloat16 else (1e-5, 1e-6)
            if not torch.allclose(a, b, rtol=rtol, atol=atol):
                worst = (a.float() - b.float()).abs().max().item()
                return f"tensor {index} differs from {rival} by {worst:.2e}"
    return None


def _after_steps(case: Case, make: Callable[[Params], torch.optim.Optimizer]) -> list[torch.Tensor]:
    params = case.params()
    optimizer = make(params)
    for _ in range(STEPS_TO_COMPARE):
        optimizer.step()
    return [param.detach() for param in params]


def copy_bandwidth(bytes_moved: int = 400_000_000) -> float:
    """Gigabytes per second of a streaming copy, reads and writes counted."""
    source = torch.ones(bytes_moved // 8)
    target = torch.empty_like(source)
    target.copy_(source)
    times = sorted(_time(lambda: target.copy_(source), 1) for _ in range(9))
    return 2 * source.nbytes / times[4] / 1e3
