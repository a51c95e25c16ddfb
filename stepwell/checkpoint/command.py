"""`python -m stepwell checkpoint`: the command line of checkpoints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .convert import convert
from .difference import difference
from .header import CheckpointError
from .reading import opened, verify
from .show import groups_table, heading, params_table, printable, tensors_table, values_table

WIDTH = 100_000
"""Columns, where the output goes to no terminal: there nothing is folded."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be done with checkpoints."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, words, run, files in (
        ("show", "what is in a file: groups, names, shapes, norms, steps, bytes", _show, ["file"]),
        ("diff", "what differs between two files", _diff, ["first", "second"]),
        ("verify", "whether a file is what was written", _verify, ["file"]),
        (
            "convert",
            "make a file of torch of a checkpoint, or a checkpoint of a file of torch",
            _convert,
            ["source", "target"],
        ),
    ):
        command = commands.add_parser(name, help=words, description=f"{words}.".capitalize())
        for file in files:
            command.add_argument(file, type=Path, metavar=file.upper())
        command.set_defaults(checkpoint=run)
        if name == "convert":
            command.add_argument(
                "--names",
                type=Path,
                metavar="FILE",
                help="where a file of torch has none: the names of the parameters, one to a line, "
                "in the order of the optimizer, group after group",
            )
            for part in ("optimizer", "scheduler"):
                command.add_argument(
                    f"--{part}",
                    metavar="PLACE",
                    help=f"which {part} of several is taken, such as {part}s.0",
                )


def run(args: argparse.Namespace) -> int:
    """Do it; 1 if files differ, or one is damaged or cannot be read."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        status: int = args.checkpoint(args, console)
    except (CheckpointError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(Text(printable(error), style="red"))
        return 1
    return status


def _show(args: argparse.Namespace, console: Console) -> int:
    with opened(args.file) as file:
        console.print(Text(f"{args.file}: {heading(file)}"))
        if "optimizer" in file.description:
            _print(console, groups_table(file))
            _print(console, params_table(file))
        if (values := values_table(file)) is not None:
            _print(console, values)
        _print(console, tensors_table(file))
    return 0


def _diff(args: argparse.Namespace, console: Console) -> int:
    with opened(args.first) as one, opened(args.second) as other:
        found = difference(one, other)
    if found is None:
        console.print("no difference")
        return 0
    _print(console, found)
    return 1


def _print(console: Console, table: Table) -> None:
    """Print a table, and let a terminal break lines that are too long even with names folded."""
    least = Measurement.get(console, console.options, table).minimum
    console.print(table, width=max(least, console.width), crop=False)


def _verify(args: argparse.Namespace, console: Console) -> int:
    verify(args.file)
    console.print(Text(f"{args.file} is what was written", style="green"))
    return 0


def _convert(args: argparse.Namespace, console: Console) -> int:
    names = None if args.names is None else _names(args.names)
    said = convert(
        args.source, args.target, names, optimizer=args.optimizer, scheduler=args.scheduler
    )
    console.print(Text(printable(f"{args.target} is written, {said}")), soft_wrap=True)
    return 0


def _names(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no list of names: {error}") from error
