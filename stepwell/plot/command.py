"""`python -m stepwell plot-schedule`: curves that are written out, as one picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..extra import ExtraMissingError
from ..lr_scheduler import parse
from .schedules import schedule

EXAMPLE = 'example: python -m stepwell plot-schedule "warmup(500) >> cosine(9500)"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `plot-schedule`."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "curves",
        nargs="+",
        metavar="CURVE",
        help="such as 'warmup(500) >> cosine(9500)': curves of stepwell.lr_scheduler, joined by >> "
        "(then), times (*) a number or one another",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="how many steps are drawn (default: until the longest curve ends)",
    )
    parser.add_argument(
        "--lr",
        type=float,
        metavar="RATE",
        help="the rate that the curves multiply (default: draw the factor itself)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("schedule.png"),
        metavar="FILE",
        help="where the picture goes; its ending says in which format (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Draw the curves, and print the path of the picture.

    Returns the exit status: 2 if a curve, a number or the file is not right.
    """
    try:
        figure = schedule([parse(text) for text in args.curves], args.steps, lr=args.lr)
        path = _file(args.out)
        figure.savefig(path)
    except (ValueError, TypeError, OSError, ExtraMissingError) as error:
        said = f"cannot write {args.out}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"python -m stepwell plot-schedule: error: {said}", file=sys.stderr)
        return 2
    print(f"Picture: {path.resolve()}")
    return 0


def _file(path: Path) -> Path:
    """Where the picture goes: Matplotlib would add an ending to a path that has none."""
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; name a file in it")
    return path if path.suffix else path.with_suffix(".png")
