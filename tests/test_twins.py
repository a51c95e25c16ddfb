"""Does each rule give torch's numbers under every combination of its flags, and torch's state?

The reference is torch's plain loop (`foreach=False`), which is written apart from our formulas.

Tolerances. Torch's loop rounds after every operation, with the gradient cast to the parameter's
dtype; we round once per step. Over 24 steps that is a random walk of a rounding or so per step,
so a few dozen ULP in float32 and float64. Torch works on bfloat16 and float16 parameters in that
very precision, where the second moment's `0.999 v` does not move at all; there the two cannot
agree better than a fraction of the distance travelled.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import stepwell
from stepwell.native.triton_jit import is_interpreting

from .cases import CASES, PLAIN, Case, named, parameters, set_grads, train
from .compare import assert_same_bits, assert_training_within, everything

# with TRITON_INTERPRET=1 these go through the kernels for GPUs
pytestmark = pytest.mark.interpret

STEPS = 24
SHAPES = ((1,), (7,), (10, 100), (), (3, 2, 5))
LIMITS = {torch.float32: 64, torch.float64: 64, torch.complex64: 64}
TWINS = tuple(dict.fromkeys((case.rule, case.twin) for case in PLAIN))


def _limit(case: Case, dtype: torch.dtype) -> float:
    if dtype is torch.float64 and any(isinstance(v, Tensor) for v in case.options.values()):
        # torch divides a rate by its bias correction in the float32 of the tensor that holds it,
        # and computes beta**step, whose difference from 1 is small, in that of the betas
        return 2**34 if "betas" in case.options else 2**29
    if dtype is torch.float64 and case.rule is stepwell.NAdam:
        # torch reads the product of its momenta back from the float32 that it has just stored
        return 2**22
    return LIMITS[dtype]


@pytest.mark.parametrize("dtype", **named((*LIMITS,)))
@pytest.mark.parametrize("case", **named(CASES))
def test_numbers(case: Case, dtype: torch.dtype) -> None:
    if not case.takes(dtype):
        pytest.skip("torch refuses it too")
    ours = train(case.make, parameters(SHAPES, dtype), STEPS)
    theirs = train(lambda p: case.make_twin(p, foreach=False), parameters(SHAPES, dtype), STEPS)
    assert_training_within(ours, theirs, _limit(case, dtype), case.name)


@pytest.mark.tiny
@pytest.mark.parametrize("case", **named(PLAIN))
def test_plain_numbers(case: Case) -> None:
    test_numbers(case, torch.float32)


@pytest.mark.parametrize("case", **named(CASES))
def test_bfloat16(case: Case) -> None:
    """Ours is as near to torch in float64 as torch in bfloat16 is, on the mean of 1,000 walks."""
    ours = train(case.make, parameters(SHAPES, torch.bfloat16), STEPS)
    theirs = train(
        lambda p: case.make_twin(p, foreach=False), parameters(SHAPES, torch.bfloat16), STEPS
    )
    exact = [torch.nn.Parameter(p.double()) for p in parameters(SHAPES, torch.bfloat16)]
    twin = case.make_twin(exact, foreach=False)
    rounded = parameters(SHAPES, torch.bfloat16)
    for step in range(STEPS):
        set_grads(rounded, step)
        for param, other in zip(exact, rounded, strict=True):
            assert other.grad is not None
            param.grad = other.grad.double()
        twin.step()
    truth = everything(twin)

    def error(optimizer: Any) -> float:
        pairs = [(t, truth[e]) for e, t in everything(optimizer).items() if e.kind == "param"]
        return float(torch.cat([(t.double() - want).flatten().abs() for t, want in pairs]).mean())

    # SGD rounds about as often as torch does: equal but for chance
    assert error(ours) <= 1.1 * error(theirs)
    assert all(
        a.dtype is b.dtype
        for a, b in zip(everything(ours).values(), everything(theirs).values(), strict=True)
    )


@pytest.mark.parametrize("case", **named(CASES))
def test_state_keys_after_real_steps(case: Case) -> None:
    for steps in (1, 3):
        ours = train(case.make, parameters(SHAPES, torch.float32), steps)
        theirs = train(case.make_twin, parameters(SHAPES, torch.float32), steps)
        members = (o.param_groups[0]["params"] for o in (ours, theirs))
        for param, twin in zip(*members, strict=True):
            one, other = ours.state.get(param, {}), theirs.state[twin]
            # torch lists a momentum that it will never have, as None
            present = {name for name, value in other.items() if value is not None}
            assert set(one) == present
            for name in present:
                assert (one[name].dtype, one[name].shape, one[name].device) == (
                    other[name].dtype,
                    other[name].shape,
                    other[name].device,
                )


@pytest.mark.parametrize("case", **named(PLAIN))
def test_extreme_gradients(case: Case) -> None:
    """NaN, infinities, subnormal and huge numbers go where torch lets them go."""
    if is_interpreting() and case.options.get("centered"):
        pytest.skip("the interpreter's multiply-add overflows between its two operations")
    values = [0.0, -0.0, 1e-45, -1e-38, 1e38, -1e38, torch.inf, -torch.inf, torch.nan, 1e-20]
    param, twin = (torch.nn.Parameter(torch.ones(len(values))) for _ in range(2))
    ours, theirs = case.make([param]), case.make_twin([twin], foreach=False)
    for _ in range(3):
        param.grad, twin.grad = torch.tensor(values), torch.tensor(values)
        ours.step()
        theirs.step()
    assert torch.equal(param.isnan(), twin.isnan())
    torch.testing.assert_close(param, twin, equal_nan=True)


@pytest.mark.parametrize(
    ("rule", "twin", "options"),
    [
        (stepwell.Adam, torch.optim.Adam, {"betas": (0.0, 0.0)}),
        (stepwell.Adafactor, torch.optim.Adafactor, {"beta2_decay": 0.0}),
    ],
)
def test_a_mean_that_forgets_all_forgets_large_gradients(
    rule: type[Any], twin: type[Any], options: dict[str, Any]
) -> None:
    """What is left of a running mean is the new gradient, not the rounding of the old one."""
    param, other = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    ours, theirs = rule([param], **options), twin([other], foreach=False, **options)
    for size in (1e6, 1e-6, 1e-6):
        param.grad, other.grad = (size * torch.tensor([[1.0, -2.0], [3.0, 4.0]]) for _ in range(2))
        ours.step()
        theirs.step()
    for name, value in theirs.state[other].items():
        torch.testing.assert_close(ours.state[param][name], value)
    torch.testing.assert_close(param, other)


# torch hands the rate of the others, and what NAdam keeps, to functions that autograd cannot follow
FOLLOWED = (stepwell.SGD, stepwell.Adam, stepwell.AdamW, stepwell.RAdam)


@pytest.mark.parametrize(("rule", "twin"), TWINS)
def test_differentiable(rule: type[Any], twin: type[Any]) -> None:
    """A gradient flows through two steps to the gradients and to the rate.

    Torch's step count is in float32 here, and with it the bias corrections.
    """
    if "differentiable" not in rule.declaration.fields:
        pytest.skip("torch has no such argument either")
    if rule in (stepwell.NAdam, stepwell.Adamax, stepwell.Rprop):
        pytest.skip("torch overwrites in place what its own gradient needs")
    results = []
    for optimizer_class in (rule, twin):
        leaf = torch.ones(3, dtype=torch.float64, requires_grad=True)
        grads = [torch.full((3,), 0.5 + i, dtype=torch.float64, requires_grad=True) for i in (0, 1)]
        rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        params = [leaf.clone()]
        lr: Any = rate if rule in FOLLOWED else 0.1
        optimizer = optimizer_class(params, lr=lr, differentiable=True)
        for grad in grads:
            params[0].grad = grad
            optimizer.step()
        (params[0] ** 2).sum().backward()
        found = [leaf.grad, *(grad.grad for grad in grads), rate.grad]
        results.append([f for f in found if f is not None])
    assert len(results[0]) == len(results[1]) >= 1
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_no_step_touches_the_gradients() -> None:
    for case in CASES:
        params = parameters(SHAPES, torch.float32)
        optimizer = case.make(params)
        set_grads(params, 0)
        before = [param.grad.clone() for param in params if param.grad is not None]
        optimizer.step()
        for i, (param, grad) in enumerate(zip(params, before, strict=True)):
            assert_same_bits(param.grad, grad, f"{case.name}: gradient {i}")
