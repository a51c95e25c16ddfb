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

from stepwell.native.triton_jit import is_interpreting
from stepwell.race.machine import describe

from . import averaging, checkpoints, gpu, schedules
from .costs import COSTS, Cost
from .cpu_cases import CASES
from .cpu_tables import costs_table, speeds_table
from .devices import Cuda, Host
from .gpu_cases import FULL, TINY
from .lbfgs import DESCENTS, Reached, descents_table, saved
from .measure import Result, copy_bandwidth, measure
from .sparse import EMBEDDINGS, Raced, embeddings_table
from .sparse import saved as saved_embedding


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
        console.print(speeds_table(results, copy_bandwidth()))
    costs = [(cost, cost.measure()) for cost in COSTS if options.only in cost.what]
    if costs:
        console.print(costs_table(costs))
    descents = [descent.measure() for descent in DESCENTS if options.only in str(descent)]
    if descents:
        console.print(descents_table(descents))
    raced = [embedding.measure() for embedding in EMBEDDINGS if options.only in str(embedding)]
    if raced:
        console.print(embeddings_table(raced))
    averages = [a.measure(options.seconds) for a in averaging.AVERAGES if options.only in str(a)]
    if averages:
        console.print(averaging.averages_table(averages))
    chosen_schedules = [s for s in schedules.SCHEDULES if options.only in str(s)]
    steps = [schedule.measure(options.seconds) for schedule in chosen_schedules]
    if steps:
        console.print(schedules.schedules_table(steps))
    files = checkpoints.compare() if options.only in checkpoints.TITLE else []
    if files:
        console.print(checkpoints.table(files))
    if options.json:
        _save(options.json, results, costs, descents, raced, averages, steps, files)
    missed = any(r.misses() for r in [*results, *descents, *raced, *averages, *steps, *files])
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


def _save(
    path: Path,
    results: list[Result],
    costs: list[tuple[Cost, float]],
    descents: list[Reached],
    raced: list[Raced],
    averages: list[averaging.Timed],
    steps: list[schedules.Stepped],
    files: list[checkpoints.Compared],
) -> None:
    rows = [
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
    once = [
        {"what": c.what, "value": round(v, 4), "unit": c.unit, "limit": c.limit} for c, v in costs
    ]
    found = {"speeds": rows, "costs": once, "lbfgs": [saved(reached) for reached in descents]}
    found["sparse"] = [saved_embedding(one) for one in raced]
    found["averages"] = [averaging.saved(one) for one in averages]
    found["schedules"] = [schedules.saved(one) for one in steps]
    found["checkpoints"] = [checkpoints.saved(one) for one in files]
    path.write_text(json.dumps({"machine": describe(), **found}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
