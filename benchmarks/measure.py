"""Measuring side by side: contenders take turns, medians count, wrong numbers have no speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from .cases import BEST, Case, Make
from .devices import Copy, Host

__all__ = ["HOST", "YARDSTICK", "Check", "Result", "copy_bandwidth", "measure", "sampler"]

HOST = Host()
# large enough that steps stand out from the rounding of bfloat16
RATE_TO_COMPARE = 0.1
YARDSTICK = "yardstick"
"""The contender of another case, which a share of a rate is taken of."""

Step = Callable[[], object]


@dataclass(frozen=True)
class Check:
    """One thing that a row must reach: `value` at least `bar`, or at most."""

    value: float
    bar: float
    unit: str
    at_most: bool = False

    @property
    def missed_by(self) -> float:
        """The share of the bar that is missing, or too much; of 1 where the bar is 0."""
        over = (self.value - self.bar) / (self.bar or 1)
        return max(over if self.at_most else -over, 0.0)

    @property
    def words(self) -> str:
        """What was reached, and what was to be."""
        digits = 1 if self.at_most else 2
        sign = self.unit.split(" ")[0]
        return f"{self.value:.{digits}f}{self.unit}, not {self.bar:g}{sign}"

    def __str__(self) -> str:
        return f"{self.bar:,g}{self.unit}"


@dataclass(frozen=True)
class Result:
    """Microseconds per step, by contender; `wrong` tells whose numbers are not right.

    `copy` is what copies in between have moved, in GB/s.
    """

    case: Case
    times: dict[str, list[float]]
    wrong: dict[str, str]
    copy: float | None = None

    @cached_property
    def medians(self) -> dict[str, float]:
        """The middle one of each contender's times."""
        return {name: statistics.median(found) for name, found in self.times.items()}

    @cached_property
    def rivals(self) -> dict[str, float]:
        """The medians of torch's ways, and the best of them under that name."""
        found = {name: self.medians[name] for name in self.case.rivals if name in self.medians}
        return found | ({BEST: min(found.values())} if found else {})

    def ratio(self, rival: str) -> float:
        """How many of our steps fit into one of the rival's."""
        return self.rivals[rival] / self.medians["stepwell"]

    @property
    def gigabytes_per_second(self) -> dict[str, float]:
        """What each contender's steps move."""
        cases = {YARDSTICK: self.case.yardstick or self.case}
        times = self.medians.items()
        return {n: cases.get(n, self.case).gigabytes_per_second(time) for n, time in times}

    @property
    def share_of_yardstick(self) -> float | None:
        """What ours moves per second as a share of what the yardstick moves."""
        if self.case.yardstick is None:
            return None
        rates = self.gigabytes_per_second
        return rates["stepwell"] / rates[YARDSTICK] if YARDSTICK in rates else None

    @property
    def shares_of_copy(self) -> dict[str, float]:
        """The same as a share of what a copy moves, where copies took turns with the steps."""
        if self.copy is None:
            return {}
        return {name: rate / self.copy for name, rate in self.gigabytes_per_second.items()}

    def checks(self) -> list[Check]:
        """What must be reached, as far as it could be measured."""
        if not self.times:
            return []
        found = [
            Check(self.ratio(rival), bar, f"x {rival}")
            for rival, bar in self.case.bars.items()
            if rival in self.rivals
        ]
        if self.case.yardstick is not None and self.share_of_yardstick is not None:
            bar = 100 * (self.case.share_of_yardstick or 0)
            name = f" % of {self.case.yardstick.rule}"
            found.append(Check(100 * self.share_of_yardstick, bar, name))
        share, limit = self.case.share_of_copy, self.case.limit
        if share is not None:
            reached = self.shares_of_copy["stepwell"]
            found.append(Check(100 * reached, 100 * share, " % of a copy"))
        if limit is not None:
            found.append(Check(self.medians["stepwell"], limit, " us", at_most=True))
        return found

    def misses(self) -> list[str]:
        """What was to be reached and was not."""
        if "stepwell" in self.wrong:
            return [f"wrong numbers: {self.wrong['stepwell']}"]
        return [check.words for check in self.checks() if check.missed_by]


def measure(case: Case, seconds: float, machine: Host = HOST, copy: Copy | None = None) -> Result:
    """Race the contenders of a case for about this long, after comparing their numbers.

    On a GPU, and wherever there is a copy to compare with, each sample is one step.
    """
    contenders, wrong = _right_ones(case, machine)
    if "stepwell" in wrong:
        return Result(case, {}, wrong)
    samples = {
        name: sampler(_stepper(case, make), case.clock, machine, copy)
        for name, make in contenders.items()
    }
    if case.yardstick is not None:
        step = _stepper(case.yardstick, case.yardstick.contenders()["fused"])
        samples[YARDSTICK] = sampler(step, case.clock, machine, copy)
    times: dict[str, list[float]] = {name: [] for name in samples}
    before = len(copy.times) if copy else 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["stepwell"]) < case.rounds:
        for name, sample in samples.items():
            times[name].append(sample())
    if copy is None or len(copy.times) == before:
        return Result(case, times, wrong)
    return Result(case, times, wrong, copy.gigabytes_per_second(before))


def _stepper(case: Case, make: Make) -> Step:
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


def sampler(step: Step, clock: str, machine: Host, copy: Copy | None) -> Callable[[], float]:
    """What measures one round of a contender, in microseconds per step."""
    if copy is None:
        return partial(_round, step, _calls_per_round(step))
    duration = [_host_time(step, machine) for _ in range(3)][-1]
    if clock == "host":
        return partial(_host_time, step, machine)
    _device_time(step, machine, copy, 1)
    # as long as the device is busy with copies, the host's work does not show
    copies = min(1 + int(1.5 * duration / copy.times.pop()), 50)
    return partial(_device_time, step, machine, copy, copies)


def _calls_per_round(step: Step) -> int:
    # long enough for the clock, short enough that all contenders see the same machine
    step()
    return max(1, min(500, int(50_000 / max(_time(step, 1), 1))))


def _round(step: Step, calls: int) -> float:
    """Microseconds per call, of a contender that has its own data in the caches, if they fit.

    What it finds there otherwise is what the contender before it left.
    """
    for _ in range(min(calls - 1, 3)):
        step()
    return _time(step, calls)


def _time(step: Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls * 1e6


def _host_time(step: Step, machine: Host) -> float:
    """Microseconds until a step returns, of a contender whose data is in the host's caches."""
    step()
    machine.wait()
    duration = _time(step, 1)
    machine.wait()
    return duration


def _device_time(step: Step, machine: Host, copy: Copy, copies: int) -> float:
    """Microseconds that the device takes for a step, right after some copies."""
    start = machine.mark()
    for _ in range(copies):
        copy()
    between = machine.mark()
    step()
    end = machine.mark()
    machine.wait()
    copy.times.append(machine.microseconds(start, between) / copies)
    return machine.microseconds(between, end)


def _right_ones(case: Case, machine: Host) -> tuple[dict[str, Make], dict[str, str]]:
    """The contenders whose parameters are those of torch's loop after a few steps; the others."""
    contenders = case.contenders()
    truth = _after_steps(case, case.loop(), torch.float32)
    wrong: dict[str, str] = {}
    for name in list(contenders) if case.has_ways else ["stepwell"]:
        try:
            problem = _problem(case, _after_steps(case, contenders[name], case.dtype), truth)
        except RuntimeError as error:
            if name == "stepwell":
                raise
            problem = str(error).split("\n")[0]
        machine.release()
        if problem is not None:
            wrong[name] = problem
            del contenders[name]
    return contenders, wrong


def _problem(
    case: Case, found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]
) -> str | None:
    """What is wrong with these parameters, given what float32 arithmetic makes of them."""
    largest, size, error, moved = torch.zeros(4, dtype=torch.float64, device=case.device)
    for ours, right, start in zip(found, truth, case.params(), strict=True):
        apart = (ours.float() - right).abs()
        largest = torch.maximum(largest, apart.max())
        size = torch.maximum(size, right.abs().max())
        error += apart.sum(dtype=torch.float64)
        moved += (right - start.detach().float()).abs().sum(dtype=torch.float64)
    # float32: a few ULP of numbers around 1. bfloat16: parameters and state are rounded to 8 bits
    # at every step, which is a small part of what a step moves, on the average
    half = case.is_rounded or case.dtype is torch.bfloat16
    # written so that NaN fails
    if not largest <= (2**-4 * size if half else 1e-5):
        return f"up to {largest:.1e} away from torch's loop after {case.steps_to_compare} steps"
    if not error <= (0.05 if half else 1e-5) * moved:
        return f"{error / moved:.0%} of a step away from torch's loop, on the average"
    return None


def _after_steps(case: Case, make: Make, dtype: torch.dtype) -> list[torch.Tensor]:
    params = case.params()
    for param in params:
        grad, param.grad = param.grad, None
        param.data = param.data.to(dtype)
        param.grad = None if grad is None else grad.to(dtype)
    optimizer = make(params, lr=RATE_TO_COMPARE)
    for _ in range(case.steps_to_compare):
        optimizer.step()
    return [param.detach() for param in params]


def copy_bandwidth(bytes_moved: int = 400_000_000) -> float:
    """Gigabytes per second of a streaming copy, reads and writes counted."""
    copy = Copy(HOST, bytes_moved)
    copy.times += [_time(copy, 1) for _ in range(9)]
    return copy.gigabytes_per_second()
