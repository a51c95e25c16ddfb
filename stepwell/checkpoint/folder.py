"""Folders of checkpoints: which is the newest that is whole, and which may go.

Every file carries the time of its saving, which is later than that of the files beside it: neither
clocks that went wrong nor copies with new dates change which one is the newest.
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

from .header import BLANK, PREFIX, CheckpointError
from .reading import verify
from .replacing import UNFINISHED

__all__ = ["check_keep", "latest", "prune", "time_of_saving"]

SAVED = re.compile(
    rb'%s[0-9a-f]{%d}","stepwell":"{\\"saved\\":([0-9]{1,40})\b' % (re.escape(PREFIX), len(BLANK))
)
"""How the header of a checkpoint begins: its time is found without reading all of it."""

NUMBERED = re.compile(r"(.*?)(?<![0-9])(?<![0-9]\.)[0-9]+((?:\.[A-Za-z]\w*)*)", re.DOTALL)
"""A name that ends in a whole number, before suffixes: what stands around that number."""

_whole: dict[Path, tuple[int, ...]] = {}
"""How files looked when this process wrote or verified them, so that none is read twice."""


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in a folder that verifies, or None.

    Damaged ones, and other files, are passed over; the newest is the one last saved.

    Raises:
        OSError: the folder cannot be read
    """
    for path in _newest_first(Path(folder).iterdir()):
        with suppress(CheckpointError, OSError):
            verify(path)
            return path
    return None


def time_of_saving(path: Path) -> int:
    """The time for a new file, in nanoseconds since 1970: now, or later if one beside it is.

    Beside it are the files in its folder with its suffix.
    """
    path = Path(os.path.realpath(path))
    times = [0]
    # whoever writes the file says what is wrong with the folder
    with suppress(OSError):
        times += [_saved_at(p) or 0 for p in path.parent.iterdir() if p.suffix == path.suffix]
    return max(time.time_ns(), 1 + max(times))


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

    Only those whose names differ from this one in the number at their end are looked at. Those that
    stay are verified, each once in a process, except for what it has written itself.
    """
    _whole[path] = _looks(path)
    alike = [other for other in path.parent.iterdir() if _are_alike(other, path)]
    others = _newest_first(other for other in alike if other != path)
    lacking = keep - 1
    for other in others if len(others) > lacking else ():
        if lacking:
            lacking -= _is_whole(other)
        else:
            _remove(other)


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
    times = {path: _saved_at(path) for path in paths}
    found = [(saved_at, path) for path, saved_at in times.items() if saved_at is not None]
    return [path for _, path in sorted(found, reverse=True)]


def _saved_at(path: Path) -> int | None:
    """When a file says it was saved; None if it is not a checkpoint, or not finished."""
    # one that is not finished may be whole, and is removed by the next save
    if path.name.endswith(UNFINISHED):
        return None
    with suppress(OSError):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                found = SAVED.match(file.read(8 + 160)[8:])
            return None if found is None else int(found[1])
    return None
