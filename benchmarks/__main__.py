"""`python -m benchmarks`: the tables of speed and cost, and a JSON file.

On the CPU the file is written if asked for; `--device cuda` writes all of it to
benchmarks/results/cuda.json unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from stepwell.native.triton_jit import is_interpreting
from stepwell.race.machine import describe

from . import averaging, checkpoints, gpu, lbfgs, schedules, sparse
from .costs import COSTS, Cost
from .cpu_cases import CASES
from .cpu_tables import costs_table, speeds_table
from .devices import Cuda, Host
from .gpu_cases import FULL, TINY
from .measure import Result, copy_bandwidth, measure


class Section(NamedTuple):
    """A table of its own: what it measures, given the seconds of each row, and how it is shown."""

    key: str
    rows: Sequence[Any]
    measure: Callable[[Any, float], Sequence[Any]]
    table: Callable[[Sequence[Any]], Table]
    saved: Callable[[Any], dict[str, Any]]


def _alone(row: Any, seconds: float) -> list[Any]:
    return [row.measure()]


def _timed(row: Any, seconds: float) -> list[Any]:
    return [row.measure(seconds)]


def _compared(title: str, seconds: float) -> Sequence[Any]:
    return checkpoints.compare()


SECTIONS = (
    Section("lbfgs", lbfgs.DESCENTS, _alone, lbfgs.descents_table, lbfgs.saved),
    Section("sparse", sparse.EMBEDDINGS, _alone, sparse.embeddings_table, sparse.saved),
    Section("averages", averaging.AVERAGES, _timed, averaging.averages_table, averaging.saved),
    Section("schedules", schedules.SCHEDULES, _timed, schedules.schedules_table, schedules.saved),
    Section("checkpoints", [checkpoints.TITLE], _compared, checkpoints.table, checkpoints.saved),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit status is 1 if a number is wrong or a bar is missed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        return _on_gpu(parser, options)
    console = Console(width=None if sys.stdout.isatty() else 132)
    console.print(describe())
    results = []
    for case in CASES:
        if options.only in f"{case.rule} {case.dtype} {case.work}":
            with console.status(f"{case.rule} {case.work}"):
                results.append(measure(case, options.seconds))
    if results:
        console.print(speeds_table(results, copy_bandwidth()))
    costs = [(cost, cost.measure()) for cost in COSTS if options.only in cost.what]
    if costs:
        console.print(costs_table(costs))
    found: dict[str, list[dict[str, Any]]] = {"speeds": speeds(results), "costs": once(costs)}
    misses = [*(r.misses() for r in results), *(value > cost.limit for cost, value in costs)]
    for section in SECTIONS:
        chosen = [row for row in section.rows if options.only in str(row)]
        measured = [one for row in chosen for one in section.measure(row, options.seconds)]
        if measured:
            console.print(section.table(measured))
        found[section.key] = [section.saved(one) for one in measured]
        misses += [one.misses() for one in measured]
    if options.json:
        options.json.write_text(json.dumps({"machine": describe(), **found}, indent=1))
    return int(any(misses))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--only", default="", help="rows whose rule, dtype or work contains this")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long each row is raced")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument(
        "--device",
        default="cpu",
        choices=["cpu", "cuda", "interpret"],
        help="where to measure; interpret: the rows of a GPU, tiny, in Triton's interpreter",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="on a GPU: share of 1 B elements")
    parser.add_argument(
        "--tune", action="store_true", help="on a GPU: try sizes of blocks, warps and chunks"
    )
    return parser


def _on_gpu(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    console = Console(width=None if sys.stdout.isatty() else 190)
    if options.device == "interpret":
        if not is_interpreting():
            parser.error("--device interpret needs TRITON_INTERPRET=1 in the environment")
        return gpu.run(Host(), TINY, options, console)
    if not torch.cuda.is_available():
        parser.error(f"no CUDA GPU found by torch {torch.__version__}: --device cuda needs one")
    if options.json is None and not (options.only or options.tune):
        options.json = Path(__file__).parent / "results" / "cuda.json"
    return gpu.run(Cuda(), FULL, options, console)


def speeds(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The rows of speed, as they are saved."""
    return [
        {
            "rule": r.case.rule,
            "dtype": str(r.case.dtype).removeprefix("torch."),
            "work": r.case.work,
            "microseconds": {name: round(value, 2) for name, value in r.medians.items()},
            "share_of_yardstick": r.share_of_yardstick,
            "missed": r.misses(),
            "wrong": r.wrong,
        }
        for r in results
    ]


def once(costs: Sequence[tuple[Cost, float]]) -> list[dict[str, Any]]:
    """What is paid once, as it is saved."""
    return [
        {"what": c.what, "value": round(v, 4), "unit": c.unit, "limit": c.limit} for c, v in costs
    ]


if __name__ == "__main__":
    sys.exit(main())
