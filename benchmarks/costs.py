"""What is paid once: importing, the first step of a program, memory beyond the state."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IMPORT = """
import time, torch
start = time.perf_counter()
import stepwell
print(time.perf_counter() - start)
"""

# Python looks through all objects of torch once more after some 10,000 new ones, whoever makes
# them: that comes before the clock starts.
FIRST_STEP = """
import gc, time, torch, stepwell
param = torch.nn.Parameter(torch.randn(1000))
param.grad = torch.randn(1000)
optimizer = stepwell.{rule}([param], {settings})
gc.collect()
for _ in range({steps}):
    start = time.perf_counter()
    optimizer.step()
    last = time.perf_counter() - start
print(last)
"""

MOMENTUM = {"rule": "SGD", "settings": "momentum=0.9"}

# The high-water mark of the process before and after steps. Kernels and state are there already.
MEMORY = """
import torch, stepwell
def peak():
    # getrusage would begin with what the process that started this one had in memory
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
def optimizer(size, pieces):
    params = [torch.nn.Parameter(torch.randn(size)) for _ in range(pieces)]
    for param in params:
        param.grad = torch.randn(size)
    return stepwell.AdamW(params, {flags})
small = optimizer(1000, 1)
small.step()
large = optimizer({size}, {pieces})
for param in large.param_groups[0]["params"]:
    entries = {{name: torch.ones_like(param) for name in ("exp_avg", "exp_avg_sq")}}
    large.state[param] = {{"step": torch.tensor(1.0), **entries}}
before = peak()
for _ in range(3):
    large.step()
print(peak() - before)
"""


@dataclass(frozen=True)
class Cost:
    """A one-off price, in a process of its own each time."""

    what: str
    unit: str
    limit: float
    code: str
    runs: int = 5

    def measure(self) -> float:
        """The median of a few processes."""
        return statistics.median(self._once() for _ in range(self.runs))

    def _once(self) -> float:
        return float(_said(self.code))


def _said(code: str, **more: str) -> str:
    """What a process of its own prints, with more in its environment."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **more})
    if done.returncode:
        raise RuntimeError(done.stderr.strip().split("\n")[-1])
    return done.stdout


COSTS = [
    Cost("import stepwell, after torch", "s", 0.15, IMPORT),
    Cost("first step of AdamW", "s", 0.15, FIRST_STEP.format(rule="AdamW", settings="", steps=1)),
    Cost("first step of SGD", "s", 0.15, FIRST_STEP.format(**MOMENTUM, steps=1)),
    # its first step has no momentum yet: another program
    Cost("second step of SGD", "s", 0.15, FIRST_STEP.format(**MOMENTUM, steps=2)),
    Cost(
        "extra memory of a step, 50 M",
        "MiB",
        1.0,
        MEMORY.format(flags="", size=50_000_000, pieces=1),
        runs=3,
    ),
    # one temporary of the parameters' size, for the denominator
    Cost(
        "extra memory of a foreach step, 20 x 1 M",
        "MiB",
        80.0,
        MEMORY.format(flags="foreach=True", size=1_000_000, pieces=20),
        runs=3,
    ),
]


# The first step of a program, and how many kernels are compiled for it and for others like it:
# other rates, shapes, numbers of parameters, and an address that no vector fits.
FIRST_KERNELS = """
import gc, json, time, torch, stepwell
def optimizer(sizes, first=0):
    params = []
    for size in sizes:
        params.append(torch.nn.Parameter(torch.randn(size + first, device="{device}")[first:]))
        params[-1].grad = torch.randn(size, device="{device}")
    return stepwell.AdamW(params, {flags})
def seconds(optimizer):
    start = time.perf_counter()
    optimizer.step()
    if "{device}" == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
def kernels():
    from triton.runtime.jit import JITFunction
    found = [f for f in gc.get_objects() if type(f) is JITFunction]
    return sum(len(cache[0]) for f in found for cache in f.device_caches.values())
begun = optimizer([1000, 77])
first, compiled = seconds(begun), kernels()
begun.param_groups[0]["lr"] = 0.5
later = [seconds(begun), seconds(optimizer([1])), seconds(optimizer([16, 4097] * 20))]
later.append(seconds(optimizer([1001], first=1)))
found = {{"seconds": first, "later": max(later), "kernels": compiled}}
print(json.dumps({{**found, "compiled_later": kernels() - compiled}}))
"""


def first_kernels(device: str, flags: Mapping[str, bool], processes: int) -> list[dict[str, Any]]:
    """The first step of AdamW on a device: with an empty cache of Triton's, and with a full one.

    `later` is the slowest first step of an optimizer that finds its kernels compiled.
    """
    arguments = ", ".join(f"{name}={value}" for name, value in flags.items())
    code = FIRST_KERNELS.format(device=device, flags=arguments)
    found: dict[str, list[dict[str, float]]] = {"empty": [], "full": []}
    for _ in range(processes):
        with tempfile.TemporaryDirectory() as folder:
            for runs in found.values():
                runs.append(json.loads(_said(code, TRITON_CACHE_DIR=folder)))
    return [
        {"cache": cache, **{key: statistics.median(run[key] for run in runs) for key in runs[0]}}
        for cache, runs in found.items()
    ]
