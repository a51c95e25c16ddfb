"""Writing a checkpoint: the header, and tensors from where they lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from .folder import time_of_saving
from .header import BLANK, Entry, encode, plan
from .pieces import as_stored, digest, get_piece, in_parallel, runs
from .replacing import replacing

__all__ = ["write"]


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    *,
    threads: int = 4,
) -> None:
    """Write a checkpoint, in place of the one of this name, which is whole until then.

    The tensors are written from where they lie. The description gets their digests and the time.

    Raises:
        OSError: with the name of the file; there is none then, or the one from before
        TypeError, ValueError: a tensor cannot be held; nothing is written
    """
    stored = {name: as_stored(tensor) for name, tensor in tensors.items()}
    entries = plan(stored)
    # first, where it is found at a glance
    description = {"saved": time_of_saving(path), **description}
    blank = dict.fromkeys(entries, BLANK)
    header = encode(entries, {**description, "digests": blank})
    with replacing(path) as fd:
        digests = _write_tensors(fd, len(header), stored, entries, threads)
        _write_at(fd, encode(entries, {**description, "digests": digests}), 0)


def _write_tensors(
    fd: int,
    first: int,
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    threads: int,
) -> dict[str, str]:
    """Write all bytes; returns the digest of each tensor."""
    work = [
        (fd, first, tensors[name], entry, run)
        for name, entry in entries.items()
        for run in runs(entry.stop - entry.start)
    ]
    found: dict[str, list[bytes]] = {name: [] for name in entries}
    owners = (name for name, e in entries.items() for _ in runs(e.stop - e.start))
    for name, digests in zip(owners, in_parallel(_write_pieces, work, threads), strict=True):
        found[name] += digests
    return {name: digest(digests) for name, digests in found.items()}


def _write_pieces(
    fd: int, first: int, tensor: Tensor, entry: Entry, pieces: list[tuple[int, int]]
) -> list[bytes]:
    digests = []
    for start, stop in pieces:
        piece = get_piece(tensor, start, stop)
        digests.append(xxhash.xxh3_128_digest(piece))
        place = first + entry.start + start
        _write_at(fd, piece, place)
        if hasattr(os, "posix_fadvise"):
            # Linux begins to write such pages to the disk, so that the sync has little to wait for
            os.posix_fadvise(fd, place, len(piece), os.POSIX_FADV_DONTNEED)
    return digests


def _write_at(fd: int, content: bytes | memoryview, place: int) -> None:
    view = memoryview(content)
    while len(view):
        written = os.pwrite(fd, view, place)
        place += written
        view = view[written:]
