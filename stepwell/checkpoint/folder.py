"""Folders of checkpoints: which is the newest that is whole, and which may go."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from .header import PREFIX, CheckpointError
from .reading import verify
from .replacing import UNFINISHED

__all__ = ["check_keep", "latest", "prune"]


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in a folder that verifies, or None.

    Damaged ones, and other files, are passed over; the newest is the one last written.

    Raises:
        OSError: the folder cannot be read
    """
    for path in _newest_first(list(Path(folder).iterdir())):
        with suppress(CheckpointError, OSError):
            verify(path)
            return path
    return None


def check_keep(path: Path, keep: Any) -> None:
    """Check that older ones can be told from this one.

    Raises:
        ValueError: no number is in the name, or none is to be kept
    """
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"save: keep must be a whole number in [1, inf), got {keep!r}")
    if not re.search(r"\d", path.name):
        raise ValueError(
            f"save: keep={keep} needs names with a number, such as step-1000.safetensors, got "
            f"{path.name}"
        )


def prune(path: Path, keep: int) -> None:
    """Remove all but the newest checkpoints whose names differ from this one in digits alone."""
    pattern = re.compile(r"\d+".join(map(re.escape, re.split(r"\d+", path.name))))
    alike = [other for other in path.parent.iterdir() if pattern.fullmatch(other.name)]
    others = [other for other in _newest_first(alike) if other.name != path.name]
    for other in others[keep - 1 :]:
        # somebody else may have removed it
        with suppress(FileNotFoundError):
            other.unlink()


def _newest_first(paths: list[Path]) -> list[Path]:
    """Those that begin as a checkpoint does, by the time at which they were written."""
    times = {}
    for path in paths:
        with suppress(OSError):
            if _begins_well(path):
                # a file system may count time in whole seconds; then the greater number is newer
                numbers = [int(digits) for digits in re.findall(r"\d+", path.name)]
                times[path] = path.stat().st_mtime_ns, numbers
    return sorted(times, key=lambda path: times[path], reverse=True)


def _begins_well(path: Path) -> bool:
    # one that is not finished may be whole, and is removed by the next save
    if path.name.endswith(UNFINISHED) or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8 + len(PREFIX))[8:] == PREFIX
