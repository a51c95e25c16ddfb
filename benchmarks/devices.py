"""Where steps are measured: the clock, the memory and the description of a CPU or a GPU."""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import time
from datetime import datetime
from importlib import import_module
from typing import Any

import torch
from torch.profiler import ProfilerActivity

__all__ = ["Copy", "Cuda", "Host"]


class Host:
    """The CPU, whose work is done when a call returns."""

    device = "cpu"
    activities: tuple[ProfilerActivity, ...] = (ProfilerActivity.CPU,)

    def mark(self) -> Any:
        """A point in the order of the device's work."""
        return time.perf_counter()

    def microseconds(self, start: Any, end: Any) -> float:
        """The device's time between two marks, once it has been waited for."""
        return float(end - start) * 1e6

    def wait(self) -> None:
        """Let the device finish what it was given."""

    def release(self) -> None:
        """Give memory that nobody uses back to the device."""

    def free_memory(self) -> int | None:
        """Bytes that could still be had, where that is known."""
        return None

    def describe(self) -> dict[str, Any]:
        """Date, device and versions."""
        return {
            "date": f"{datetime.now():%Y-%m-%d %H:%M}",
            "gpu": None,
            "memory_bytes": None,
            "driver": None,
            "torch": torch.__version__,
            "triton": _triton_version(),
            "python": platform.python_version(),
        }


class Cuda(Host):
    """The current GPU, which works behind the host's back."""

    device = "cuda"
    activities = (ProfilerActivity.CPU, ProfilerActivity.CUDA)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def microseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) * 1e3

    def wait(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        # an optimizer and its plan refer to each other
        gc.collect()
        torch.cuda.empty_cache()

    def free_memory(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def describe(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = {"gpu": found.name, "memory_bytes": found.total_memory, "driver": _driver()}
        return super().describe() | gpu


def _triton_version() -> str | None:
    try:
        return str(import_module("triton").__version__)
    except ImportError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


class Copy:
    """A copy within a device's memory: the most bytes per second that a step could move.

    Attributes:
        num_bytes: how many it reads and writes
        times: microseconds per copy, as they were measured
    """

    def __init__(self, machine: Host, num_bytes: int) -> None:
        self._source = torch.ones(max(num_bytes // 8, 1), device=machine.device)
        self._target = torch.empty_like(self._source)
        self.num_bytes = 2 * self._source.nbytes
        self.times: list[float] = []
        self()

    def __call__(self) -> None:
        """Do it once."""
        self._target.copy_(self._source)

    def gigabytes_per_second(self, first: int = 0) -> float:
        """What it moved, by the median of the times from this one on."""
        return self.num_bytes / statistics.median(self.times[first:]) / 1e3
