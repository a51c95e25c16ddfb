"""`--device cuda`: the rows of a GPU, in a JSON file that grows row by row, and in tables."""

from __future__ import annotations

import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

import stepwell
from stepwell.race.machine import describe

from .cases import Case
from .costs import first_kernels
from .counting import count
from .devices import Copy, Host
from .gpu_cases import Sizes, gpu_cases, resized
from .gpu_tables import line, tables
from .measure import Check, Result, measure
from .tune import tune

__all__ = ["run"]

# A GPU may be lent for minutes: what has not begun by then is left out, and said to be.
SECONDS_FOR_ALL = 420.0
# Others may use the same GPU; torch's foreach needs memory for what it computes in between.
SHARE_OF_MEMORY = 0.6
INTERMEDIATES = 3

# whether Triton has to compile or finds what it needs on disk
FIRST_STEP_SECONDS = 1.5

FLAGS: tuple[Mapping[str, bool], ...] = ({}, {"fused": True}, {"capturable": True})
TUNED = ("AdamW", "SGD")
SECTIONS = ("speeds", "counts", "first_steps", "tuning")

Row = dict[str, Any]


class Task(NamedTuple):
    """What is measured, the section of the report that its rows go to, and how to get them."""

    what: str
    section: str
    rows: Callable[[], list[Row]]


def run(machine: Host, sizes: Sizes, options: Namespace, console: Console) -> int:
    """Measure, print and save; the exit status is 1 if a number is wrong or a bar is missed."""
    report: dict[str, Any] = {"machine": machine.describe() | {"host": describe()}}
    report |= {"seconds": options.seconds, "scale": options.scale, "copy": None, "left_out": []}
    report |= {section: [] for section in SECTIONS}
    for name, value in report["machine"].items():
        console.print(f"{name}: {value}", highlight=False)
    copy = Copy(machine, sizes.copy_bytes)
    begun = time.perf_counter()
    try:
        for task in _tasks(machine, sizes, options, copy):
            if options.only not in task.what:
                continue
            if time.perf_counter() - begun > SECONDS_FOR_ALL:
                report["left_out"].append(task.what)
                continue
            rows = _attempt(task)
            machine.release()
            report[task.section] += rows
            report["copy"] = _copy_row(copy)
            _save(options.json, report)
            for row in rows:
                console.print(line(row), highlight=False)
    finally:
        for table in tables(report):
            console.print(table)
    if report["left_out"]:
        _save(options.json, report)
        console.print(f"left out after {SECONDS_FOR_ALL:g} s: {'; '.join(report['left_out'])}")
    rows = [row for section in SECTIONS for row in report[section]]
    return int(bool(report["left_out"]) or any(row["missed"] for row in rows))


def _tasks(machine: Host, sizes: Sizes, options: Namespace, copy: Copy) -> Iterator[Task]:
    """Everything, what matters most first."""
    cases = gpu_cases(machine.device, sizes)
    if options.tune:
        for case in cases:
            if case.is_limited_by_memory and case.rule in TUNED:
                rows = partial(_tuned, case, machine, options.scale, copy)
                yield Task(f"tune {_named(case)}", "tuning", rows)
        return
    others = [case for case in cases if case.rule != "AdamW"]
    for case in cases:
        if case not in others:
            yield Task(_named(case), "speeds", partial(_speeds, case, machine, options, copy))
    for flags in FLAGS:
        what = f"counts of {_spelt(flags)}, {len(sizes.many):,} tensors"
        yield Task(what, "counts", partial(_counts, machine, sizes, flags))
    for flags in sizes.first_steps:
        rows = partial(_first_steps, machine, sizes.processes, flags)
        yield Task(f"first step of {_spelt(flags)}", "first_steps", rows)
    for case in others:
        yield Task(_named(case), "speeds", partial(_speeds, case, machine, options, copy))


def _named(case: Case) -> str:
    dtype = str(case.dtype).removeprefix("torch.")
    return f"{case.rule} {dtype}, {case.work}, {case.clock} time"


def _spelt(flags: Mapping[str, bool]) -> str:
    return f"AdamW({', '.join(f'{name}={value}' for name, value in flags.items())})"


def _attempt(task: Task) -> list[Row]:
    """The rows of a task; one that says what went wrong if it failed, so that others can follow."""
    common: Row = {"what": task.what, "missed": [], "error": None}
    try:
        return [common | row for row in task.rows()]
    except Exception as error:
        words = f"{type(error).__name__}: {error}".split("\n")[0]
        return [common | {"missed": ["failed"], "error": words}]


def _save(path: Path | None, report: Mapping[str, Any]) -> None:
    """Write the report so that an interruption leaves a whole file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1))
        part.replace(path)


# The rows


def _summary(times: list[float]) -> Row:
    low, _, high = statistics.quantiles(times, n=4)
    return {"median": statistics.median(times), "quartiles": [low, high], "samples": len(times)}


def _copy_row(copy: Copy) -> Row | None:
    if len(copy.times) < 2:
        return None
    rate = copy.gigabytes_per_second()
    return {"bytes": copy.num_bytes, "microseconds": _summary(copy.times), "GB/s": rate}


def _fitting(case: Case, machine: Host, scale: float) -> tuple[Case, float]:
    """The case at a scale at which all contenders fit into memory side by side, and that scale."""
    if not case.is_limited_by_memory:
        return case, 1.0
    free = machine.free_memory()
    if free is not None:
        held = case.traffic.held * len(case.contenders()) + INTERMEDIATES * case.dtype.itemsize
        scale = min(scale, SHARE_OF_MEMORY * free / (held * sum(case.sizes)))
    return (case if scale == 1 else resized(case, scale)), scale


def _speeds(case: Case, machine: Host, options: Namespace, copy: Copy) -> list[Row]:
    fit, scale = _fitting(case, machine, options.scale)
    result = measure(fit, options.seconds, machine, copy)
    return [{"what": _named(fit), "scale": scale, **_speed_row(fit, result)}]


def _speed_row(case: Case, result: Result) -> Row:
    row = {
        "rule": case.rule,
        "dtype": str(case.dtype).removeprefix("torch."),
        "work": case.work,
        "clock": case.clock,
        "back-end": _backend(case),
        "tensors": len(case.sizes),
        "elements": sum(case.sizes),
        "microseconds": {name: _summary(times) for name, times in result.times.items()},
        "ratios": {name: result.ratio(name) for name in result.times if name != "stepwell"},
        "checks": [_check(check) for check in result.checks()],
        "missed": result.misses(),
        "wrong": result.wrong,
    }
    if not case.is_limited_by_memory:
        return row
    return row | {
        "bytes_per_element": case.traffic.moved,
        "GB/s": result.gigabytes_per_second,
        "copy GB/s": result.copy,
        "share_of_copy": result.shares_of_copy,
    }


def _backend(case: Case, **flags: bool) -> str:
    """What runs stepwell's step, in the words of the optimizer's repr."""
    few = replace(case, sizes=(5, 3))
    optimizer = few.optimizer(stepwell, few.params(), **flags)
    # the first step of some rules is another program
    for _ in range(2):
        optimizer.step()
    return repr(optimizer).rpartition("Backend: ")[2].rstrip(")\n")


def _check(check: Check) -> Row:
    return {"bar": str(check), "value": check.value, "missed_by": check.missed_by}


def _counts(machine: Host, sizes: Sizes, flags: Mapping[str, bool]) -> list[Row]:
    case = Case("", "AdamW", sizes.many, device=machine.device)
    optimizer = case.optimizer(stepwell, case.params(), **flags)
    optimizer.step()
    found = {"flags": dict(flags), "back-end": _backend(case, **flags)}
    return [found | count(machine, optimizer.step)]


def _first_steps(machine: Host, processes: int, flags: Mapping[str, bool]) -> list[Row]:
    rows = []
    for found in first_kernels(machine.device, flags, processes):
        checks = [Check(found["seconds"], FIRST_STEP_SECONDS, " s", at_most=True)]
        if found["kernels"]:
            checks.append(Check(found["compiled_later"], 0, " compilations later", at_most=True))
        missed = [check.words for check in checks if check.missed_by]
        outcomes = [_check(check) for check in checks]
        rows.append({**found, "flags": dict(flags), "checks": outcomes, "missed": missed})
    return rows


def _tuned(case: Case, machine: Host, scale: float, copy: Copy) -> list[Row]:
    fit, scale = _fitting(case, machine, scale)
    return [{"what": f"tune {_named(fit)}", **row} for row in tune(fit, machine, copy)]
