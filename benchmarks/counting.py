"""What a step asks of a device, counted by torch's profiler: launches and uploads."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .devices import Host

__all__ = ["count", "counted"]

STEPS = 4


def count(machine: Host, step: Callable[[], object]) -> dict[str, Any]:
    """`counted` for a few steps, after others of which the profiler may miss the beginning."""
    step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with torch.profiler.profile(
            activities=machine.activities,
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda profile: profile.export_chrome_trace(str(path)),
        ) as profile:
            for _ in range(2):
                for _ in range(STEPS):
                    step()
                machine.wait()
                profile.step()
        return counted(json.loads(path.read_text())["traceEvents"], STEPS)


def counted(events: Iterable[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """Launches, uploads and their bytes per step, from the events of a trace of several steps."""
    kernels: Counter[str] = Counter()
    uploads: list[int] = []
    for event in events:
        if event.get("cat") == "kernel":
            # a template's arguments would fill a page
            kernels[str(event["name"]).split("<")[0][:80]] += 1
        elif event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"]:
            uploads.append(int(event["args"]["bytes"]))
    return {
        "launches": sum(kernels.values()) / steps,
        "uploads": len(uploads) / steps,
        "upload_bytes": sum(uploads) / steps,
        "kernels": {name: number / steps for name, number in kernels.items()},
    }
