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
optimizer.zero_grad(set_to_none=False)
start = time.perf_counter()
optimizer.step()
print(time.perf_counter() - start)
"""

# The high-water mark of the process before and after steps, once everything is warm.
MEMORY = """
import resource, torch, stepwell
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def optimizer(size):
    param = torch.nn.Parameter(torch.randn(size))
    param.grad = torch.randn(size)
    return stepwell.AdamW([param])
optimizer(1000).step()
large = optimizer(50_000_000)
large.step()
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
    Cost("first step of AdamW", "s", 0.15, FIRST_STEP.format(rule="AdamW", settings="")),
    Cost("first step of SGD", "s", 0.15, FIRST_STEP.format(rule="SGD", settings="momentum=0.9")),
    Cost("extra memory of a step, 50 M", "MiB", 1.0, MEMORY, runs=1),
]
