"""Does torch.profiler show steps, and what they keep?"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from .shell_cases import ours, theirs

# the profiler warns of itself
pytestmark = pytest.mark.filterwarnings("ignore")

FIRST_STEP = """
import torch, stepwell
from torch.profiler import ProfilerActivity, profile

weight = torch.nn.Parameter(torch.ones(3))
optimizer = stepwell.AdamW([weight])
weight.grad = torch.ones(3)
with profile(activities=[ProfilerActivity.CPU], with_stack=True) as recorded:
    optimizer.step()
names = [event.key for event in recorded.key_averages()]
assert any("plan.py" in name for name in names)
# a module's code is gone when the names are read
assert not [name for name in names if "llvmlite" in name and "<module>" in name]
assert "llvmlite" in __import__("sys").modules
"""


def test_a_first_step_leaves_a_profile_that_can_be_read() -> None:
    subprocess.run([sys.executable, "-c", FIRST_STEP], check=True)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Muon"])
def test_the_state_is_found(name: str) -> None:
    found = []
    for library in (ours, theirs):
        model = torch.nn.Linear(30, 30, bias=False)
        options = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = library(name)(model.parameters(), lr=0.1, **options)
        with profile(
            activities=[ProfilerActivity.CPU],
            with_stack=True,
            record_shapes=True,
            profile_memory=True,
        ) as recorded:
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.ones(2, 30)).sum().backward()
                optimizer.step()
        memory = recorded._memory_profile()
        kept: Counter[str] = Counter()
        for _, action, (key, version), size in memory.timeline:
            category = memory._categories.get(key, version)
            if action.name == "CREATE" and category is not None and category.name.startswith("OPT"):
                kept[category.name] += size
        labels = [e.name for e in recorded.events() if e.name.startswith("Optimizer.")]
        found.append((kept, labels))
    (kept, labels), (theirs_kept, theirs_labels) = found
    assert labels == theirs_labels
    assert kept["OPTIMIZER_STATE"] >= 30 * 30 * 4
    if name != "Muon":
        assert kept == theirs_kept
