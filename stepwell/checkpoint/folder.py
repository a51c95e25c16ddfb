"""Folders of checkpoints: which is the newest that is whole, and which may go.

Every file carries the time of its saving, which is later than that of the files beside it: neither
clocks that went wrong nor copies with new dates change which one is the newest.

A checkpoint is a file, whatever its names are: links are followed, and never removed.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .background import Background
from .header import BLANK, PREFIX, CheckpointError
from .reading import verify
from .replacing import UNFINISHED

__all__ = ["check_keep", "latest", "prune", "time_of_saving"]

SAVED = re.compile(
    rb'%s[0-9a-f]{%d}","stepwell":"{\\"saved\\":([0-9]{1,40})\b' % (re.escape(PREFIX), len(BLANK))
)
"""How the header of a checkpoint begins: its time is found without reading all of it."""

LAST = 2**63 - 1
"""The latest time of saving that is believed: no clock of nanoseconds says more."""

NUMBERED = re.compile(r"(.*?)(?<![0-9])(?<![0-9]\.)[0-9]+((?:\.[A-Za-z]\w*)*)", re.DOTALL)
"""A name that ends in a whole number, before suffixes: what stands around that number."""

_whole: dict[Path, tuple[int, ...]] = {}
"""How files looked when this process wrote or verified them, so that none is read twice."""


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in a folder that verifies, or None, also where there is no folder yet.

    Damaged ones, and other files, are passed over; the newest is the one last saved, also where
    that is still going on in the background of this process.

    Raises:
        OSError: the folder cannot be read
    """
    Background.settle()
    try:
        paths = list(Path(folder).iterdir())
    except FileNotFoundError:
        # a first run makes it when it saves
        return None
    for path in _newest_first(paths):
        with suppress(CheckpointError, OSError):
            verify(path)
            return path
    return None


def time_of_saving(path: Path) -> int:
    """The time for a new file, in nanoseconds since 1970: now, or later if one beside it is.

    Beside it are all files in its folder, and in that of the file which it leads to.
    """
    times = [time.time_ns()]
    for folder in {path.parent, Path(os.path.realpath(path)).parent}:
        # whoever writes the file says what is wrong with the folder
        with suppress(OSError):
            ages = map(_age, folder.iterdir())
            times += [1 + saved_at for saved_at, _ in filter(None, ages)]
    return min(max(times), LAST)


def check_keep(path: Path, keep: Any) -> None:
    """Check that older ones can be told from this one.

    Raises:
        ValueError: the name does not end in a number, or none is to be kept
    """
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"save: keep must be a whole number in [1, inf), got {keep!r}")
    if not NUMBERED.fullmatch(path.name):
        raise ValueError(
            f"save: keep={keep} needs names that end in a whole number, such as "
            f"step-1000.safetensors, got {path.name}"
        )


def prune(path: Path, keep: int) -> None:
    """Remove checkpoints that are older than the newest `keep` whole ones.

    Only files whose names differ from this one in the number at their end are looked at: links to
    files neither count nor go, and what a link in the folder leads to stays. Those that stay are
    verified, each once in a process, except for what it has written itself.
    """
    _whole[path] = _looks(path)
    beside = [other for other in path.parent.iterdir() if other != path]
    linked = {_identity(other) for other in beside if other.is_symlink()}
    files = [p for p in beside if _are_alike(p, path) and not p.is_symlink()]
    others = {other: _identity(other) for other in _newest_first(files)}
    # by what they are: a file may have several names
    counted = {_identity(path)}
    for other, file in others.items() if len(counted.union(others.values())) > keep else ():
        if len(counted) < keep:
            if _is_whole(other):
                counted.add(file)
        elif file not in counted | linked:
            _remove(other)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells the file that a name leads to from all others; None if it leads to none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _are_alike(one: Path, other: Path) -> bool:
    found, others = NUMBERED.fullmatch(one.name), NUMBERED.fullmatch(other.name)
    return found is not None and others is not None and found.groups() == others.groups()


def _is_whole(path: Path) -> bool:
    """Whether a file verifies; one that looks as it did then is not read again."""
    with suppress(CheckpointError, OSError):
        looks = _looks(path)
        if _whole.get(path) != looks:
            verify(path)
            _whole[path] = looks
        return True
    return False


def _looks(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _remove(path: Path) -> None:
    _whole.pop(path, None)
    try:
        # somebody else may have removed it
        path.unlink(missing_ok=True)
    except OSError as error:
        # an error would say that nothing was saved
        warnings.warn(f"save: an old checkpoint is left: {error}", RuntimeWarning, stacklevel=1)


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    """Those that begin as a checkpoint does, by the time of their saving."""
    found = [(age, path) for path in paths if (age := _age(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def _age(path: Path) -> tuple[int, int] | None:
    """When a file says it was saved, and for equal times, when the file system says so.

    None if it is not a checkpoint, or not finished.
    """
    # one that is not finished may be whole, and is removed by the next save
    if path.name.endswith(UNFINISHED):
        return None
    with suppress(OSError):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                found = SAVED.match(file.read(8 + 160)[8:])
                written_at = os.fstat(file.fileno()).st_mtime_ns
            if found is not None and int(found[1]) <= LAST:
                return int(found[1]), written_at
    return None
