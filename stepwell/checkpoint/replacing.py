"""A file that takes the place of another all or nothing: beside it, synced, then renamed."""

from __future__ import annotations

import errno
import os
import platform
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

__all__ = ["UNFINISHED", "replacing"]

UNFINISHED = ".unfinished-checkpoint"
"""How the names of files end that are still being written, or that a killed process has left."""

DAY = 24 * 60 * 60
"""Seconds after which what another machine has not touched is a leftover."""

UNCHANGED = "no checkpoint was written"


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A new file to write to, which takes the place of `path` if nothing goes wrong.

    A link goes on leading to the file, and the file keeps its mode.

    Raises:
        OSError: with the name of the file that was to be written
    """
    with _naming(path, UNCHANGED):
        mode = _mode(path)
        target = Path(os.path.realpath(path))
        _make_folder(target.parent)
        _remove_leftovers(target.parent)
        unfinished, fd = _created(target, mode)
    try:
        with _naming(path, UNCHANGED):
            yield fd
            _set_mode(fd, mode)
            os.fsync(fd)
            # others may read the name while this is written
            os.replace(unfinished, target)
        with _naming(path, "the new checkpoint is in place; a loss of power may undo that"):
            _sync_folder(target.parent)
    finally:
        with suppress(OSError):
            os.close(fd)
        with suppress(OSError):
            unfinished.unlink()


@contextmanager
def _naming(path: Path, consequence: str) -> Iterator[None]:
    """Errors of the system name the file that was to be written, and say what there is now."""
    try:
        yield
    except OSError as error:
        number = error.errno or errno.EIO
        words = f"{error.strerror or os.strerror(number)} ({consequence})"
        raise OSError(number, words, str(path)) from error


def _make_folder(folder: Path) -> None:
    """Make a folder, and those above it, that survive a loss of power."""
    if not folder.exists():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _mode(path: Path) -> int | None:
    """Who may read and write the file that is replaced, or None if there is none."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "A pipe, socket or device is not replaced by a file")
    return stat.S_IMODE(mode) & 0o777


def _set_mode(fd: int, mode: int | None) -> None:
    # some file systems have one mode for all files, and refuse to set it
    if mode is not None and stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        os.fchmod(fd, mode)


def _created(target: Path, mode: int | None) -> tuple[Path, int]:
    """A hidden file beside this one, locked, so that nobody takes it for a leftover."""
    # names have 255 bytes at most, and 143 on some encrypted file systems
    start = target.name.encode(errors="ignore")[:80].decode(errors="ignore")
    while True:
        name = f".{start}.{_host()}-{secrets.token_hex(4)}{UNFINISHED}"
        unfinished = target.with_name(name)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        fd = os.open(unfinished, flags, 0o666 if mode is None else mode | 0o600)
        if _is_claimed(fd, unfinished):
            return unfinished, fd
        os.close(fd)


def _is_claimed(fd: int, unfinished: Path) -> bool:
    """Lock a new file; False if somebody was faster, and has removed it."""
    try:
        _lock(fd)
    except BlockingIOError:
        return False
    except OSError:
        # the file system has no locks: then nobody removes leftovers there
        return True
    return unfinished.exists()


def _host() -> str:
    return xxhash.xxh32_hexdigest(platform.node().encode())


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # file systems that have no such thing say so
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left; whoever still writes holds a lock."""
    for leftover in folder.glob(f".*{UNFINISHED}"):
        # somebody else may have removed it, and what cannot be locked stays
        with suppress(OSError):
            # opening a pipe would wait; to lock on NFS, a file must be open for writing
            fd = os.open(leftover, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                _lock(fd)
                if _is_leftover(leftover.name, os.fstat(fd)):
                    leftover.unlink()
            finally:
                os.close(fd)


def _is_leftover(name: str, status: os.stat_result) -> bool:
    """Whether a file that nobody seems to have locked is one: locks may not reach other machines.

    Lustre mounted with `localflock` and NFS with `local_lock` are such file systems.
    """
    is_own = f".{_host()}-" in name
    return stat.S_ISREG(status.st_mode) and (is_own or time.time() - status.st_mtime > DAY)


def _lock(fd: int) -> None:
    # not on Windows
    import fcntl

    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
