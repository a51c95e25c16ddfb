"""`python -m benchmarks`: the tables of speed and cost, and a JSON file.

On the CPU the file is written if asked for; `--device cuda` writes all of it to
benchmarks/results/cuda.json unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from stepwell.native.triton_jit import is_interpreting
from stepwell.race.machine import describe

from . import gpu
from .cases import CASES, FULL, TINY, Case
from .costs import COSTS, Cost
from .devices import Cuda, Host
from .measure import Result, copy_bandwidth, measure


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit status is 1 if a number is wrong or a bar is missed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        return _on_gpu(parser, options)
    console = Console(width=None if sys.stdout.isatty() else 132)
    chosen = [case for case in CASES if options.only in f"{case.rule} {case.dtype} {case.work}"]
    console.print(describe())
    results = []
    for case in chosen:
        with console.status(f"{case.rule} {case.work}"):
            results.append(measure(case, options.seconds))
    if results:
        console.print(_speeds(results, copy_bandwidth()))
    costs = [(cost, cost.measure()) for cost in COSTS if options.only in cost.what]
    if costs:
        console.print(_costs(costs))
    if options.json:
        _save(options.json, results, costs)
    missed = any(r.misses() for r in results)
    return int(missed or any(value > cost.limit for cost, value in costs))


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


def _speeds(results: list[Result], copy: float) -> Table:
    table = Table(title=f"microseconds per step, medians (a copy moves {copy:.1f} GB/s)")
    table.add_column("work")
    for name in ("stepwell", "torch fused", "torch default", "vs fused", "vs default", "GB/s"):
        table.add_column(name, justify="right")
    table.add_column("must reach")
    section = None
    for result in results:
        name = f"{result.case.rule}, {str(result.case.dtype).removeprefix('torch.')}"
        if name != section:
            table.add_section()
            table.add_row(f"[bold]{name}[/bold]")
            section = name
        table.add_row(*_row(result))
    return table


def _row(result: Result) -> list[str]:
    case = result.case
    names = ("stepwell", "fused", "default")
    times = ["wrong" if n in result.wrong else _number(result.medians.get(n)) for n in names]
    ratios = [result.ratio(n) if n in result.medians else None for n in ("fused", "default")]
    missed = result.misses()
    return [
        case.work,
        *times,
        *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        f"{result.gigabytes_per_second['stepwell']:.1f}"
        if case.is_limited_by_memory and result.medians
        else "",
        f"[red]{'; '.join(missed)}[/red]" if missed else f"[green]{_bars(case)}[/green]",
    ]


def _number(time: float | None) -> str:
    return "" if time is None else f"{time:,.1f}"


def _bars(case: Case) -> str:
    bars = [f"{bar:g}x {rival}" for rival, bar in case.bars.items()]
    limit = [] if case.limit is None else [f"{case.limit:g} us"]
    return ", ".join([*limit, *bars])


def _costs(costs: list[tuple[Cost, float]]) -> Table:
    table = Table(title="paid once")
    for name in ("what", "measured", "at most"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for cost, value in costs:
        colour = "green" if value <= cost.limit else "red"
        table.add_row(
            cost.what,
            f"[{colour}]{value:.3f} {cost.unit}[/{colour}]",
            f"{cost.limit:g} {cost.unit}",
        )
    return table


def _save(path: Path, results: list[Result], costs: list[tuple[Cost, float]]) -> None:
    rows = [
        {
            "rule": r.case.rule,
            "dtype": str(r.case.dtype).removeprefix("torch."),
            "work": r.case.work,
            "microseconds": {name: round(value, 2) for name, value in r.medians.items()},
            "missed": r.misses(),
            "wrong": r.wrong,
        }
        for r in results
    ]
    once = [
        {"what": c.what, "value": round(v, 4), "unit": c.unit, "limit": c.limit} for c, v in costs
    ]
    path.write_text(json.dumps({"machine": describe(), "speeds": rows, "costs": once}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
