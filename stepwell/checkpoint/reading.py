"""Reading a file: nothing is believed before its digest was compared, nothing is executed."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from .header import PREFIX, CheckpointError, Header, check_length, parse
from .pieces import (
    PIECE,
    check_system,
    digest,
    in_parallel,
    memory,
    runs,
    set_piece,
    synchronize,
)

__all__ = ["SCHEMA", "File", "opened", "verify"]

SCHEMA = 1
"""The version of the description; a file with a later one is refused."""


def verify(path: str | os.PathLike[str]) -> None:
    """Read all of a checkpoint, and compare it with its digests.

    Raises:
        CheckpointError: it is damaged, or no checkpoint
        OSError: it cannot be read
    """
    with opened(path) as file:
        file.check(file.header.entries)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[File]:
    """The file, with its header checked; errors about its content name it.

    Raises:
        CheckpointError: it is damaged, or no checkpoint
        OSError: it cannot be read
    """
    check_system()
    # opening a pipe would wait for whoever writes to it
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CheckpointError("is no file")
        yield File(fd)
    except CheckpointError as error:
        error.args = (f"{Path(path)} {error}",)
        raise
    finally:
        os.close(fd)


class File:
    """An open checkpoint.

    Attributes:
        header: where the tensors lie
        description: everything else that was saved
        touched: the names of the tensors that the last `fill` has read into targets, or begun to
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._local = threading.local()
        self.touched: set[str] = set()
        num_bytes = os.fstat(fd).st_size
        length = check_length(os.pread(fd, 8 + len(PREFIX), 0), num_bytes)
        content = bytearray(length)
        self._read(memoryview(content), 8)
        self.header: Header = parse(bytes(content), num_bytes)
        self.description = self.header.description
        self._digests = self._known_digests()

    def _known_digests(self) -> dict[str, str]:
        schema, digests = (self.description.get(key) for key in ("schema", "digests"))
        if type(schema) is not int or not 1 <= schema <= SCHEMA:
            raise CheckpointError(
                f"is of version {schema!r:.40}; this version of stepwell reads up to {SCHEMA}"
            )
        if not isinstance(digests, dict) or digests.keys() != self.header.entries.keys():
            raise CheckpointError("is damaged: it lacks digests of tensors")
        return digests

    def require(self, name: Any) -> None:
        """Check that there is a tensor of this name."""
        if not isinstance(name, str) or name not in self.header.entries:
            raise CheckpointError(f"is damaged: it speaks of a tensor {name!r:.80} that it lacks")

    def num_bytes(self, name: str) -> int:
        """The size of a tensor."""
        self.require(name)
        entry = self.header.entries[name]
        return entry.stop - entry.start

    def digest(self, name: str) -> Any:
        """The digest of a tensor, as the file has it."""
        return self._digests[name]

    def like(self, name: str) -> Tensor:
        """A tensor of the same shape and dtype that has no values."""
        self.require(name)
        entry = self.header.entries[name]
        try:
            return torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        except RuntimeError:
            raise CheckpointError(f"is damaged: {name!r} is too large for this machine") from None

    def tensor(self, name: str) -> Tensor:
        """A copy of a tensor, in the host's memory."""
        like = self.like(name)
        made = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        self.fill([(name, made)])
        return made

    def check(self, names: Iterable[str]) -> None:
        """Compare tensors with their digests.

        Raises:
            CheckpointError: bytes are not those that were written
        """
        self.fill([(name, None) for name in names])

    def fill(self, targets: Sequence[tuple[str, Tensor | None]]) -> None:
        """Read tensors into those beside them, which have their shapes; None only compares digests.

        Raises:
            CheckpointError: bytes are not those that were written; some targets are filled
        """
        self.touched = set()
        work = [
            (i, name, target, run)
            for i, (name, target) in enumerate(targets)
            for run in runs(self.num_bytes(name))
        ]
        synchronize(target for _, target in targets if target is not None)
        found: list[list[bytes]] = [[] for _ in targets]
        for (i, *_), digests in zip(work, in_parallel(self._take, work), strict=True):
            found[i] += digests
        for (name, _), digests in zip(targets, found, strict=True):
            if digest(digests) != self._digests[name]:
                raise CheckpointError(f"is damaged: the bytes of {name!r} are not what was written")

    # which is a matter of each thread; targets may have been made in this mode
    @torch.inference_mode()
    def _take(
        self, _: int, name: str, target: Tensor | None, pieces: Sequence[tuple[int, int]]
    ) -> list[bytes]:
        """Read pieces of a tensor; returns their digests."""
        entry = self.header.entries[name]
        direct = None
        if target is not None and target.dtype == entry.dtype:
            direct = memory(target.detach())
        if target is not None:
            self.touched.add(name)
        digests = []
        for start, stop in pieces:
            view = self._buffer(stop - start) if direct is None else direct[start:stop]
            self._read(view, self.header.first + entry.start + start)
            digests.append(xxhash.xxh3_128_digest(view))
            if target is not None and direct is None:
                set_piece(target, start, stop, torch.frombuffer(view, dtype=entry.dtype))
        return digests

    def _buffer(self, size: int) -> memoryview:
        """Memory of this thread, which is used again and again: new memory takes longer to get."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memory(torch.empty(PIECE, dtype=torch.uint8, device="cpu"))
        buffer: memoryview = self._local.buffer
        return buffer[:size]

    def _read(self, view: memoryview, place: int) -> None:
        while len(view):
            count = os.preadv(self._fd, [view[:PIECE]], place)
            if not count:
                raise CheckpointError("ended early: it was cut while it was read")
            place += count
            view = view[count:]
