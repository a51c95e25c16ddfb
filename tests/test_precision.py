"""Is a step at least as precise as torch's? The table itself: `python -m benchmarks.precision`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.precision import DTYPES, OURS, RULES, measure

from .cases import named


@pytest.mark.parametrize("dtype", **named(DTYPES))
@pytest.mark.parametrize("rule", RULES)
def test_no_backend_is_worse_than_the_better_one_of_torchs(rule: str, dtype: torch.dtype) -> None:
    row = measure(rule, dtype, size=2048)
    for backend in OURS:
        assert not row.worse(backend), backend


@pytest.mark.parametrize("dtype", **named((torch.bfloat16, torch.float16)))
@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_rounded_once_per_step(rule: str, dtype: torch.dtype) -> None:
    errors = measure(rule, dtype, size=256).errors
    # half a ULP is what rounding costs; float32 within adds a ten-thousandth of that
    assert all(errors[backend].step.largest < 0.501 for backend in OURS)


def test_the_measure_sees_a_worse_step() -> None:
    row = measure("Adam", torch.float32, size=256)
    assert row.worse("torch fused") == row.worse("torch for-loop") == []
    halved = measure("Adam", torch.bfloat16, size=256)
    assert halved.worse("torch for-loop")
