"""`python -m stepwell race`: the command line of a race."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from ..extra import ExtraMissingError
from . import machine
from .contenders import OURS, RIVAL, Contender, rules
from .progress import progress
from .runner import Plan, race
from .table import failures, table, verdict
from .task import TaskError, load

DEFAULT_TASK = "stepwell.race.digits:digits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `race`."""
    plan = Plan()
    parser.add_argument(
        "--task",
        default=DEFAULT_TASK,
        metavar="MODULE:FUNCTION",
        help="a function that returns a stepwell.race.Task (default: %(default)s)",
    )
    for option, default, words in (
        (
            "--epochs",
            plan.epochs,
            "passes over the training data, half of them once more to test a resume",
        ),
        ("--batch-size", plan.batch_size, "rows per backward pass"),
        ("--accumulate", plan.accumulate, "backward passes per optimizer step"),
        # a small net gains little from more, and on a busy machine they wait for each other
        ("--threads", 1, "threads of torch, more pay off for larger tasks"),
    ):
        parser.add_argument(
            option,
            type=_positive,
            default=default,
            metavar="N",
            help=f"{words} (default: {default})",
        )
    parser.add_argument(
        "--seed",
        type=int,
        default=plan.seed,
        metavar="N",
        help="of the first parameters and the order of the rows (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="FOLDER",
        help="where the picture goes (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Race, print a table and the path of a picture.

    Returns the exit status: 1 if a resumed run is not exact, 2 if the task, the extra or the
    folder is not there.
    """
    try:
        return _race(args, Console(highlight=False))
    except (TaskError, ExtraMissingError) as error:
        print(f"python -m stepwell race: error: {error}", file=sys.stderr)
        return 2


def _race(args: argparse.Namespace, console: Console) -> int:
    # imported before the work, so that a missing package is noticed at once
    from .picture import draw

    torch.set_num_threads(args.threads)
    task = load(args.task)
    plan = Plan(args.epochs, args.batch_size, args.accumulate, args.seed)
    picture = _folder(args.out) / "race.png"
    contestants = rules(plan.epochs)
    contenders = [Contender(rule, library) for rule in contestants for library in (RIVAL, OURS)]
    described = machine.describe()
    console.print(described, style="dim")
    with progress(console, contenders, plan) as report:
        duels = [race(task, rule, plan, report) for rule in contestants]
    console.print("", table(task, duels), "", *verdict(duels), sep="\n")
    draw(task.name, duels, described, picture)
    console.print(f"Picture: {picture}", soft_wrap=True)
    return 1 if failures(duels) else 0


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TaskError(
            f"cannot write to the folder {path} ({error.strerror}); name another with --out"
        ) from error
    return path.resolve()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number
