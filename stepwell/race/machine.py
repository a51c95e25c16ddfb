"""The machine a number was measured on."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from pathlib import Path

import torch

from ..version import __version__


def describe() -> str:
    """Processor, cores, threads, versions and date, in one line."""
    threads = torch.get_num_threads()
    return (
        f"{_processor()}, {_cores()} cores, {threads} torch thread{'s' * (threads != 1)}, "
        f"torch {torch.__version__}, stepwell {__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{datetime.now():%Y-%m-%d %H:%M}"
    )


def _processor() -> str:
    # platform.processor() is empty on most Linux systems
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
