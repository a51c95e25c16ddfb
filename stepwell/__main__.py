"""`python -m stepwell`: each function declares one sub-command, COMMANDS lists them."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .terminal import printable
from .version import __version__

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def race(commands: Commands) -> None:
    """Declare `race`."""
    from .race import command

    summary = "train one task with torch.optim and with stepwell, and compare"
    parser = commands.add_parser("race", help=summary, description=f"{summary}.".capitalize())
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


def plot_schedule(commands: Commands) -> None:
    """Declare `plot-schedule`."""
    from .plot import command

    summary = "draw schedules of the learning rate"
    parser = commands.add_parser(
        "plot-schedule", help=summary, description=f"{summary}.".capitalize()
    )
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


def checkpoint(commands: Commands) -> None:
    """Declare `checkpoint`."""
    from .checkpoint import command

    summary = "show, compare, verify and convert checkpoints"
    parser = commands.add_parser("checkpoint", help=summary, description=f"{summary}.".capitalize())
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


COMMANDS = (race, plot_schedule, checkpoint)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command, or print the help where none is named; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stepwell",
        description="A drop-in replacement for torch.optim: import stepwell as optim.",
        epilog="python -m stepwell COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    with printable():
        status: int = args.run(args)
    return status


def _versions() -> str:
    """Return the versions that the report of a fault should name."""
    return f"stepwell {__version__}, torch {torch.__version__}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
