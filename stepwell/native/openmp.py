"""The threads that torch already has: one OpenMP runtime, one pool, `torch.set_num_threads`."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import NamedTuple

import torch

__all__ = ["Runtime", "runtime", "threads"]


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
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "libgomp" in line}
        # several copies can be loaded; torch's own lies in its folder
        home = os.path.dirname(os.path.dirname(torch.__file__))
        path = min(paths, key=lambda path: (not path.startswith(home), path))
        library = ctypes.CDLL(path)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        found = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names)
        return Runtime(*(address or 0 for address in found))
    except (OSError, ValueError, AttributeError):
        return None


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
