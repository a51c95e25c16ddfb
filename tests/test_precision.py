"""Is a step at least as precise as torch's? The table itself: `python -m benchmarks.precision`."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from benchmarks.precision import DTYPES, OURS, RULES, Row, measure

from .cases import named


@cache
def _measured(rule: str, dtype: torch.dtype) -> Row:
    return measure(rule, dtype, size=1024, steps=40)


@pytest.mark.parametrize("dtype", **named(DTYPES))
@pytest.mark.parametrize("rule", RULES)
def test_no_backend_is_worse_than_the_better_one_of_torchs(rule: str, dtype: torch.dtype) -> None:
    if dtype is torch.float64 and np.finfo(np.longdouble).nmant == 52:
        pytest.skip("a long double is a double here: there is no truth for float64")
    row = _measured(rule, dtype)
    for backend in OURS:
        worse = row.worse(backend)
        if (rule, backend) == ("Adagrad", "eager"):
            # it rounds g * g before it adds, which is one operation of torch's
            worse = [what for what in worse if not what.startswith("step, largest")]
        assert not worse, backend


@pytest.mark.parametrize("dtype", **named((torch.bfloat16, torch.float16)))
@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_rounded_once_per_step(rule: str, dtype: torch.dtype) -> None:
    errors = _measured(rule, dtype).errors
    # half a ULP is what rounding costs; float32 within adds a ten-thousandth of that
    assert all(errors[backend].step.largest < 0.501 for backend in OURS)


def test_the_measure_sees_a_worse_step() -> None:
    assert not _measured("Adam", torch.float32).worse("torch for-loop")
    assert _measured("Adam", torch.bfloat16).worse("torch for-loop")
