"""The bytes of a tensor, piece by piece, wherever it lies: no copy of all of it is ever made.

The digest of a tensor is the XXH3-128 of the XXH3-128s of its pieces, so that pieces can be hashed
side by side, each while the processor still has it at hand. Digests are to find accidents, and
XXH3 does so at the speed of memory (12 GB/s on one core, where SHA-256 reaches 1.5).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
import xxhash
from torch import Tensor

__all__ = [
    "PIECE",
    "as_stored",
    "check_system",
    "digest",
    "get_piece",
    "in_parallel",
    "memory",
    "runs",
    "set_piece",
    "synchronize",
]

PIECE = 1 << 20
"""Bytes that are written, read and hashed at a time; part of the format."""

RUN = 8
"""How many pieces are one task of a thread."""


def check_system() -> None:
    """Check that the system can read and write at given places of a file.

    Raises:
        NotImplementedError: it cannot
    """
    lacking = [f"os.{name}" for name in ("preadv", "pwrite") if not hasattr(os, name)]
    if lacking:
        raise NotImplementedError(
            "checkpoints are read and written on Linux and macOS; this system lacks "
            + " and ".join(lacking)
        )


def as_stored(tensor: Tensor) -> Tensor:
    """The tensor as files have it: real numbers, a complex one being two."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def runs(num_bytes: int) -> Iterator[list[tuple[int, int]]]:
    """The pieces (from, to) of a tensor of this many bytes, in lists that may run side by side."""
    found = [(start, min(start + PIECE, num_bytes)) for start in range(0, num_bytes, PIECE)]
    yield from (found[i : i + RUN] for i in range(0, len(found), RUN))


def digest(pieces: Sequence[bytes]) -> str:
    """The digest of a tensor whose pieces have these digests."""
    return xxhash.xxh3_128_hexdigest(b"".join(pieces))


def in_parallel(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], most: int = 4
) -> list[Any]:
    """What the function returns for each of these arguments, on this thread and some more.

    On this one alone where the system gives no others.
    """
    waiting = deque(range(len(arguments)))
    found: list[Any] = [None] * len(arguments)

    def work() -> None:
        try:
            while (i := _next(waiting)) is not None:
                found[i] = function(*arguments[i])
        except BaseException:
            # an error, or an interrupt: what has not begun need not
            waiting.clear()
            raise

    helpers = min(most, os.cpu_count() or 1, len(arguments)) - 1
    if helpers < 1:
        work()
        return found
    helping: list[Future[None]] = []
    with ThreadPoolExecutor(helpers, thread_name_prefix="checkpoint") as pool:
        # there are no new ones while the interpreter ends, in functions of atexit
        with suppress(RuntimeError):
            helping.extend(pool.submit(work) for _ in range(helpers))
        work()
    for each in helping:
        each.result()
    return found


def _next(waiting: deque[int]) -> int | None:
    # others may have taken the last one since it was seen
    try:
        return waiting.popleft()
    except IndexError:
        return None


def synchronize(tensors: Iterable[Tensor]) -> None:
    """Let devices finish what was asked of them: threads read and write on streams of their own."""
    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        torch.accelerator.synchronize(device)


def memory(tensor: Tensor) -> memoryview | None:
    """The bytes of a tensor where they lie, if they lie in order and in the host's memory."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def get_piece(tensor: Tensor, start: int, stop: int) -> memoryview:
    """The bytes from `start` to `stop` of a tensor, in the order of its elements."""
    first, last = start // tensor.element_size(), stop // tensor.element_size()
    if tensor.is_contiguous():
        piece = tensor.reshape(-1)[first:last].cpu()
    else:
        piece = torch.empty(last - first, dtype=tensor.dtype, device="cpu")
        for here, part in _parts(tensor, first, last):
            piece[here].view(part.shape).copy_(part)
    view = memory(piece)
    assert view is not None
    return view


def set_piece(tensor: Tensor, start: int, stop: int, values: Tensor) -> None:
    """Write values whose bytes, from `start` to `stop`, are those of a tensor of this shape."""
    first, last = start // values.element_size(), stop // values.element_size()
    if tensor.is_contiguous():
        tensor.view(-1)[first:last].copy_(values)
        return
    for here, part in _parts(tensor, first, last):
        part.copy_(values[here].view(part.shape))


def _parts(tensor: Tensor, first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
    """Views of a tensor that hold these elements in their order, and which of them each holds.

    There are at most two for each dimension, whatever the strides are.
    """
    start = 0
    for part in _views(tensor, first, last):
        yield slice(start, start + part.numel()), part
        start += part.numel()


def _views(tensor: Tensor, first: int, last: int) -> Iterator[Tensor]:
    if last - first == tensor.numel():
        yield tensor
        return
    row = tensor[0].numel()
    # whole rows, and what comes before and after them
    begin, end = -(-first // row), last // row
    if begin > end:
        yield from _views(tensor[end], first - end * row, last - end * row)
        return
    if first < begin * row:
        yield from _views(tensor[begin - 1], first - (begin - 1) * row, row)
    if begin < end:
        yield tensor[begin:end]
    if end * row < last:
        yield from _views(tensor[end], 0, last - end * row)
