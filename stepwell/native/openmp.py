"""The threads that torch already has: one OpenMP runtime, one pool, `torch.set_num_threads`."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch

__all__ = ["Runtime", "libraries", "runtime", "threads"]


class Runtime(NamedTuple):
    """Addresses of the functions of a GNU OpenMP runtime."""

    parallel: int
    thread_number: int
    team_size: int


@cache
def runtime() -> Runtime | None:
    """The GNU OpenMP runtime that torch loaded, if it is there (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        with open("/proc/self/maps", "rb") as maps:
            paths = libraries(maps, b"libgomp")
        # several copies can be loaded; torch's own lies in its folder
        home = os.path.dirname(os.path.dirname(torch.__file__))
        path = min(paths, key=lambda path: (not path.startswith(home), path))
        library = ctypes.CDLL(path)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        found = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names)
        return Runtime(*(address or 0 for address in found))
    except (OSError, ValueError, AttributeError):
        return None


def libraries(maps: Iterable[bytes], name: bytes) -> set[str]:
    """The paths of the loaded files whose path has the name in it, from /proc/self/maps."""
    # the path comes sixth, and may have spaces and bytes that are no text
    columns = (line.rstrip(b"\n").split(maxsplit=5) for line in maps)
    return {os.fsdecode(found[5]) for found in columns if len(found) > 5 and name in found[5]}


_forked = False


def threads() -> int:
    """How many threads a step may use now."""
    if _forked or runtime() is None:
        return 1
    return torch.get_num_threads()


def _after_fork() -> None:
    # the pool's threads do not exist in the child, and waiting for them would never end
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
