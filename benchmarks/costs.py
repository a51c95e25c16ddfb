"""What is paid once: importing, the first step of a program, memory beyond the state."""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import dataclass

IMPORT = """
import time, torch
start = time.perf_counter()
import stepwell
print(time.perf_counter() - start)
"""

FIRST_STEP = """
import time, torch, stepwell
param = torch.nn.Parameter(torch.randn(1000))
param.grad = torch.randn(1000)
optimizer = stepwell.{rule}([param], {settings})
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
        done = subprocess.run(
            [sys.executable, "-c", self.code], check=True, capture_output=True, text=True
        )
        return float(done.stdout)


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
