"""Does a rule stay with its formula for thousands of steps, and where its state turns over?

Gradients come from a fixed sequence, so that nothing pulls a parameter back that has drifted.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import stepwell

from .cases import NATIVE, REQUESTS, named, numbers
from .compare import assert_training_within, everything, real, typical, ulps

STEPS = 3000
SIZE = 48


# the rules whose state goes on growing or shrinking, and those that have forgotten after a while
SLOW = ("Adagrad", "ASGD", "Adadelta")
RULES: dict[str, dict[str, Any]] = {
    "Adagrad": {"lr": 0.1, "lr_decay": 1e-3, "weight_decay": 1e-3},
    "ASGD": {"lr": 0.05, "lambd": 1e-3, "t0": 500.0},
    "Adadelta": {"lr": 1.0, "weight_decay": 1e-3},
    "NAdam": {"lr": 2e-3},
    "RAdam": {"lr": 1e-3},
    "Adamax": {"lr": 2e-3},
    "RMSprop": {"lr": 1e-3, "momentum": 0.9, "centered": True, "eps": 1e-4},
    "Rprop": {"lr": 1e-2},
}


@cache
def _grads(dtype: torch.dtype) -> Tensor:
    """One row per step, rounded to float32 for every dtype, so that all learn from the same."""
    # a pull that lasts, and noise that is larger
    pull = torch.linspace(-0.2, 0.2, SIZE, dtype=torch.float64)
    return (pull + numbers((STEPS, SIZE), torch.float64, 1)).float().to(dtype)


@cache
def _run(name: str, ours: bool, dtype: torch.dtype) -> Any:
    param = torch.nn.Parameter(numbers((SIZE,), torch.float32, 1).to(dtype))
    library, flags = (stepwell, REQUESTS[NATIVE]) if ours else (torch.optim, {"foreach": False})
    optimizer = getattr(library, name)([param], **RULES[name], **flags)
    for grad in _grads(dtype)[: STEPS if name in SLOW else STEPS // 5]:
        param.grad = grad
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", RULES)
def test_many_steps_are_torchs_in_float64(name: str) -> None:
    ours, theirs = (_run(name, mine, torch.float64) for mine in (True, False))
    # one rounding or so a step, in any direction: a random walk of sqrt(3,000), with room; in
    # NAdam torch reads the product of its momenta back from float32
    limit = 2**22 if name == "NAdam" else 8 * math.sqrt(STEPS)
    assert_training_within(ours, theirs, limit, name)


@pytest.mark.parametrize("name", RULES)
def test_float32_drifts_no_further_than_torchs(name: str) -> None:
    """From the way that torch takes in float64, on the mean over elements, for every tensor."""
    truth = everything(_run(name, False, torch.float64))
    errors = []
    for mine in (True, False):
        found = everything(_run(name, mine, torch.float32))
        errors.append({entry.kind: _error(found[entry], truth[entry]) for entry in truth})
    for kind, error in errors[0].items():
        # half a ULP is what storing costs; where both are that near, chance decides
        assert error <= 1.1 * errors[1][kind] + 0.5, f"{kind}: {error} ULP, torch {errors[1][kind]}"


def _error(found: Tensor, truth: Tensor) -> float:
    wide = found.double()
    return float(ulps(found, truth, typical([real(wide)])).mean())


@pytest.mark.parametrize("dtype", **named((torch.float32, torch.float64)))
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.9, 0.9), (0.5, 0.5)])
def test_radam_begins_to_trust_its_mean_square_when_torch_does(
    betas: tuple[float, float], dtype: torch.dtype
) -> None:
    params = [torch.nn.Parameter(torch.ones(5, dtype=dtype)) for _ in range(2)]
    ours = stepwell.RAdam(params[:1], lr=0.1, betas=betas)
    theirs = torch.optim.RAdam(params[1:], lr=0.1, betas=betas, foreach=False)
    longest = 2 / (1 - betas[1]) - 1
    trusted = []
    for step in range(1, 13):
        for param in params:
            param.grad = numbers((5,), dtype, step)
        before = params[0].detach().clone()
        ours.step()
        theirs.step()
        assert_training_within(ours, theirs, 16, f"step {step}")
        # without the mean square, the step is lr m / (1 - b1^t)
        plain = before - 0.1 * ours.state[params[0]]["exp_avg"] / (1 - betas[0] ** step)
        trusted.append(not torch.allclose(params[0], plain, rtol=1e-5, atol=1e-6))
        power = betas[1] ** step
        assert trusted[-1] == (longest - 2 * step * power / (1 - power) > 5)
    assert trusted[5:] == [longest > 5] * 7 or betas[1] < 0.95


def test_the_product_of_nadams_momenta_goes_to_zero_as_torchs_does() -> None:
    param, twin = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    ours = stepwell.NAdam([param], lr=1e-3)
    theirs = torch.optim.NAdam([twin], lr=1e-3, foreach=False)
    exact = 1.0
    for step in range(1, STEPS + 1):
        param.grad, twin.grad = (torch.full((3,), 0.5) for _ in range(2))
        ours.step()
        theirs.step()
        exact *= 0.9 * (1 - 0.5 * 0.96 ** (step * 4e-3))
        one, other = (o.state[p]["mu_product"] for o, p in ((ours, param), (theirs, twin)))
        # ours multiplies in float64 and rounds once, torch in float32
        assert float(ulps(one, other, 0.0)) <= 1 + step // 2
        if exact > 1e-30:
            assert float(one) == pytest.approx(exact, rel=6e-8 * (1 + step**0.5))
    assert float(one) == float(other) == 0.0


def test_rprop_keeps_its_sizes_to_the_bit() -> None:
    """Products with 0.5 and 1.2 and their bounds: a compiled kernel rounds them as torch does."""
    param, twin = (torch.nn.Parameter(numbers((SIZE,), torch.float32, 1)) for _ in range(2))
    ours = stepwell.Rprop([param], lr=1e-2, step_sizes=(1e-4, 0.5), fused=True)
    theirs = torch.optim.Rprop([twin], lr=1e-2, step_sizes=(1e-4, 0.5), foreach=False)
    bounds = set()
    for step in range(STEPS // 3):
        # signs that last for a while, so that sizes reach both bounds
        grad = _grads(torch.float32)[step // (1 + step // 40 % 7)]
        param.grad, twin.grad = grad, grad.clone()
        ours.step()
        theirs.step()
        size = ours.state[param]["step_size"]
        bounds |= {float(size.min()), float(size.max())}
    for name in ("prev", "step_size"):
        assert torch.equal(ours.state[param][name], theirs.state[twin][name])
    assert {min(bounds), max(bounds)} == {float(torch.tensor(1e-4)), 0.5}
    assert_training_within(ours, theirs, 8, "Rprop")
