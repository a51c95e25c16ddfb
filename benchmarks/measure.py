"""Measuring side by side: contenders take turns, medians count, wrong numbers have no speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .cases import Case, Make

STEPS_TO_COMPARE = 5
# large enough that steps stand out from the rounding of bfloat16
RATE_TO_COMPARE = 0.1


@dataclass(frozen=True)
class Result:
    """Medians in microseconds per step, by contender; `wrong` tells whose numbers are not right."""

    case: Case
    medians: dict[str, float]
    wrong: dict[str, str]

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
        if "stepwell" in self.wrong:
            return [f"wrong numbers: {self.wrong['stepwell']}"]
        missed = [
            f"{self.ratio(rival):.2f}x {rival}, not {bar}x"
            for rival, bar in self.case.bars.items()
            if rival in self.medians and self.ratio(rival) < bar
        ]
        limit = self.case.limit
        if limit is not None and self.medians["stepwell"] > limit:
            missed.append(f"{self.medians['stepwell']:.1f} us, not {limit:g}")
        return missed


def measure(case: Case, seconds: float) -> Result:
    """Race the contenders of a case for about this long, after comparing their numbers."""
    contenders, wrong = _right_ones(case)
    if "stepwell" in wrong:
        return Result(case, {}, wrong)
    steps = {name: _stepper(case, make) for name, make in contenders.items()}
    rounds = {name: _calls_per_round(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["stepwell"]) < 7:
        for name, step in steps.items():
            times[name].append(_round(step, rounds[name]))
    medians = {name: statistics.median(found) for name, found in times.items()}
    return Result(case, medians, wrong)


def _stepper(case: Case, make: Make) -> Callable[[], object]:
    params = case.params()
    optimizer = make(params)
    optimizer.step()
    if not case.missing:
        return optimizer.step
    grads = [param.grad for param in params]
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        # what this costs is part of every contender's time
        present = (torch.rand(len(params), generator=generator) >= case.missing).tolist()
        for param, grad, keep in zip(params, grads, present, strict=True):
            param.grad = grad if keep else None
        optimizer.step()

    return step


def _calls_per_round(step: Callable[[], object]) -> int:
    # long enough for the clock, short enough that all contenders see the same machine
    step()
    return max(1, min(500, int(50_000 / max(_time(step, 1), 1))))


def _round(step: Callable[[], object], calls: int) -> float:
    """Microseconds per call, of a contender that has its own data in the caches, if they fit.

    What it finds there otherwise is what the contender before it left.
    """
    for _ in range(min(calls - 1, 3)):
        step()
    return _time(step, calls)


def _time(step: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls * 1e6


def _right_ones(case: Case) -> tuple[dict[str, Make], dict[str, str]]:
    """The contenders whose parameters are those of torch's loop after a few steps; the others."""
    contenders = case.contenders()
    truth = _after_steps(case, partial(case.optimizer, torch.optim), torch.float32)
    wrong: dict[str, str] = {}
    for name in list(contenders):
        found = _after_steps(case, contenders[name], case.dtype)
        problem = _problem(case, torch.cat(found).float(), torch.cat(truth))
        if problem is not None:
            wrong[name] = problem
            del contenders[name]
    return contenders, wrong


def _problem(case: Case, found: torch.Tensor, truth: torch.Tensor) -> str | None:
    """What is wrong with these parameters, given what float32 arithmetic makes of them."""
    error = (found - truth).abs()
    moved = (truth - torch.cat(case.params()).detach().float()).abs().mean()
    # float32: a few ULP of numbers around 1. bfloat16: parameters and state are rounded to 8 bits
    # at every step, which is a small part of what a step moves, on the average
    half = case.dtype is torch.bfloat16
    if error.max() > (2**-4 * truth.abs().max() if half else 1e-5):
        return f"up to {error.max():.1e} away from torch's loop after {STEPS_TO_COMPARE} steps"
    if error.mean() > (0.05 if half else 1e-5) * moved:
        return f"{error.mean() / moved:.0%} of a step away from torch's loop, on the average"
    return None


def _after_steps(case: Case, make: Make, dtype: torch.dtype) -> list[torch.Tensor]:
    params = case.params()
    for param in params:
        grad, param.grad = param.grad, None
        param.data = param.data.to(dtype)
        param.grad = None if grad is None else grad.to(dtype)
    optimizer = make(params, lr=RATE_TO_COMPARE)
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
