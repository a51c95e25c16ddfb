"""Do other back-ends take over where llvmlite is missing or does not work, and is it said once?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MISSING = "sys.modules['llvmlite'] = None"
BROKEN = """
import llvmlite.binding
def fail(*_): raise RuntimeError("no target for this processor")
llvmlite.binding.Target.from_default_triple = fail
"""

STEPS = """
import torch
import stepwell
from tests.cases import CLASSES
from tests.compare import backends

for name in CLASSES:
    rule = getattr(stepwell, name)
    for flags in ({}, {"fused": True}):
        if not flags.keys() <= rule.declaration.fields.keys():
            continue
        p, q = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(4, 3))
        for library, param in ((stepwell, p), (torch.optim, q)):
            made = getattr(library, name)([param], **(flags if library is stepwell else {}))
            for step in range(3):
                grad = torch.zeros(4, 3)
                grad[step] = 0.5
                param.grad = grad.to_sparse(1) if name == "SparseAdam" else grad
                made.step((lambda p=param: 0.5 * (p * p).sum()) if name == "LBFGS" else None)
            if library is stepwell and name not in ("LBFGS", "Muon"):
                expected = "eager" if name == "SparseAdam" else "foreach"
                assert backends(made) == {expected}, (name, backends(made))
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-3 if name == "Muon" else 1e-6)
"""


@pytest.mark.parametrize(
    ("before", "reason"),
    [(MISSING, "llvmlite cannot be imported"), (BROKEN, "no target for this processor")],
    ids=["missing", "broken"],
)
def test_every_rule_steps(before: str, reason: str) -> None:
    root = Path(__file__).parents[1]
    script = f"import sys\n{before}\n{STEPS}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "no native code" in line]
    assert len(said) == 1
    assert reason in said[0]
