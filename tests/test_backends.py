"""Does every back-end compute what the formula says, the same for any threads and any grouping?

The reference is eager, which calls the formula itself. A back-end may use fused multiply-add and
multiply by an inverse, each a rounding more or less per operation; a step rounds its result once
more. Formulas with one step's few operations stay within a handful of ULP over a few steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

import stepwell
from stepwell.language import amax, mean, norm, zeros
from stepwell.language import sum as total
from stepwell.native.openmp import libraries, runtime
from stepwell.native.triton_jit import is_interpreting

from .cases import (
    CASES,
    FLOATS,
    NATIVE,
    PLAIN,
    REQUESTS,
    SIZES,
    Case,
    named,
    parameters,
    set_grads,
    train,
)
from .compare import (
    assert_same_bits,
    assert_same_training,
    assert_training_within,
    assert_within,
    backends,
    everything,
    snapshot,
    threads,
)
from .rules import RULES, Factored, Prodigy

# with TRITON_INTERPRET=1 these go through the kernels for GPUs
pytestmark = pytest.mark.interpret

# Rounded to half precision once per step, results differ by a step of it where float32 results
# lie on two sides of a boundary; the next steps may carry that on.
LIMITS = {torch.float32: 8, torch.float64: 8, torch.bfloat16: 2, torch.float16: 2}
# What is divided by the root of a sum that starts at zero, or of a sum of very small squares, may
# begin with all digits in doubt: a difference of one step of half precision is then a whole step.
WIDER = {
    (stepwell.Adagrad, torch.bfloat16): 8,
    (stepwell.Adagrad, torch.float16): 8,
    (stepwell.Adadelta, torch.float32): 16,
    (stepwell.Adadelta, torch.float64): 16,
    # a root mean square of all elements comes before, whose rounding reaches each of them
    (stepwell.Adafactor, torch.bfloat16): 8,
    (stepwell.Adafactor, torch.float16): 8,
}
# A norm comes before the elementwise part, so that its rounding reaches every element; and a
# small difference of gradients is multiplied where a rule looks at their change.
RULE_LIMITS = {torch.float32: 64, torch.float64: 64, torch.bfloat16: 2, torch.float16: 2}

MATRICES = ((3, 4), (7, 5), (100, 70), (1, 1), (0, 3))
REDUCING = {
    "LAMB",
    "LARS",
    "Prodigy",
    "MARS",
    "CautiousAdamW",
    "SignedMax",
    "Factored",
    "Adafactor",
}
# on foreach, numbers of a parameter's state are computed on the host, before any reduction
FEEDING_BACK = {"Prodigy"}
# rows and columns have no kernels for GPUs yet: there, and in their interpreter, others take over
BY_ROWS = "cpu" if is_interpreting() else NATIVE


@pytest.mark.tiny
def test_the_runtime_of_threads_is_found_whatever_the_folder_is_called():
    home = "/home/m\udcfc/my runs/torch/lib/libgomp.so.1"  # a byte that is no UTF-8
    line = b"7f00-7f10 r-xp 00000000 08:01 1234                   "
    maps = [line + os.fsencode(home) + b"\n", line + b"/lib/libc.so\n", line.rstrip() + b"\n"]
    assert libraries(maps, b"libgomp") == {home}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Threads are a setting of the process: put it back."""
    if is_interpreting():
        pytest.skip("Triton's interpreter has no threads")
    if runtime() is None:
        pytest.skip("this torch has no OpenMP runtime whose threads a step could use")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _trained(case: Case, dtype: torch.dtype, request: str, steps: int = 4) -> Any:
    optimizer = train(lambda p: case.make(p, **REQUESTS[request]), parameters(SIZES, dtype), steps)
    assert backends(optimizer) == {request}
    return optimizer


@pytest.mark.parametrize("dtype", **named(FLOATS))
@pytest.mark.parametrize("case", **named(CASES))
def test_backends_agree(case: Case, dtype: torch.dtype) -> None:
    eager = _trained(case, dtype, "eager")
    for request in ("foreach", NATIVE):
        other = _trained(case, dtype, request)
        limit = WIDER.get((case.rule, dtype), LIMITS[dtype])
        assert_training_within(other, eager, limit, f"{case.name} on {request}")


@pytest.mark.tiny
@pytest.mark.parametrize("case", **named(PLAIN))
def test_plain_rules_agree(case: Case) -> None:
    test_backends_agree(case, torch.float32)


@pytest.mark.parametrize("dtype", **named(FLOATS))
@pytest.mark.parametrize("rule", RULES)
def test_rules_from_outside_agree(rule: type[Any], dtype: torch.dtype) -> None:
    # Prodigy starts from steps of 1e-6, which half precision would round away
    options = {"d0": 1e-2} if rule is Prodigy else {}

    def trained(**request: bool) -> Any:
        return train(lambda p: rule(p, **options, **request), parameters(MATRICES, dtype), 5)

    eager = trained(foreach=False)
    assert backends(eager) == {"eager"}
    fused, foreach = trained(fused=True), trained(foreach=True)
    assert backends(fused) == {BY_ROWS if rule is Factored else NATIVE}
    assert backends(foreach) == ({"eager"} if rule.__name__ in FEEDING_BACK else {"foreach"})
    for name, other in (("fused", fused), ("foreach", foreach)):
        assert_training_within(other, eager, RULE_LIMITS[dtype], f"{rule.__name__}, {name}")
    found = everything(eager)
    assert all(bool(t.isfinite().all()) for entry, t in found.items() if entry.kind == "param")


def test_the_fastest_is_the_default() -> None:
    for case in PLAIN:
        assert backends(train(case.make, parameters(SIZES, torch.float32), 2)) == {NATIVE}
        if case.takes(torch.complex64):
            assert backends(train(case.make, parameters(SIZES, torch.complex64), 2)) == {NATIVE}


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"fused": None, "foreach": None}, NATIVE),
        ({"fused": False}, "eager"),
        ({"foreach": False}, "eager"),
        ({"foreach": False, "fused": True}, NATIVE),
        ({"foreach": True, "fused": False}, "foreach"),
        ({"differentiable": True}, "eager"),
    ],
)
def test_torchs_flags_choose(request_: dict[str, Any], expected: str) -> None:
    params: list[Any] = list(parameters(SIZES, torch.float32))
    if request_.get("differentiable"):
        # as in torch, autograd refuses to overwrite a leaf
        params = [param.clone() for param in params]
        for param in params:
            param.retain_grad()
    made = stepwell.AdamW(params, **request_)
    set_grads(params, 0)
    made.step()
    assert backends(made) == {expected}


# Threads


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", **named(FLOATS))
@pytest.mark.parametrize("case", **named(PLAIN))
def test_same_bits_for_any_threads(case: Case, dtype: torch.dtype) -> None:
    shapes = ((30_000,), (7,), (17_001,), (123, 45), (1,))
    pair = train(case.make, parameters(shapes, dtype), 3)
    assert threads(pair) == 2
    torch.set_num_threads(1)
    alone = train(case.make, parameters(shapes, dtype), 3)
    assert threads(alone) == 1
    assert_same_training(pair, alone, case.name)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "rule", [*(r for r in RULES if r.__name__ in REDUCING), stepwell.Adafactor]
)
def test_reductions_do_not_depend_on_threads(rule: type[Any]) -> None:
    # in float64, where no rounding of the result hides the order of a sum
    shapes = ((200, 300), (7, 5), (130, 140))
    pair = train(rule, parameters(shapes, torch.float64), 3)
    assert threads(pair) == 2
    torch.set_num_threads(1)
    assert_same_training(pair, train(rule, parameters(shapes, torch.float64), 3), rule.__name__)


@pytest.mark.usefixtures("two_threads")
def test_a_change_of_threads_between_steps_changes_nothing() -> None:
    shapes = ((40_000,), (30, 20))
    params, others = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    changing, steady = stepwell.AdamW(params), stepwell.AdamW(others)
    for step, count in enumerate((2, 1, 2, 2, 1)):
        torch.set_num_threads(count)
        set_grads(params, step)
        set_grads(others, step)
        changing.step()
        torch.set_num_threads(1)
        steady.step()
    assert_same_training(changing, steady, "threads 2, 1, 2, 2, 1")


# Groups


def _split(params: list[Any], sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [{"params": params[a:b]} for a, b in pairwise(bounds)]


@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 2, 2), (1, 1, 1, 1, 1, 1), (5, 0, 1)])
@pytest.mark.parametrize("request_", **named(tuple(REQUESTS)))
def test_same_bits_for_any_split_into_groups(request_: str, sizes: tuple[int, ...]) -> None:
    for case in PLAIN:
        options = REQUESTS[request_]
        whole = train(lambda p: case.make(p, **options), parameters(SIZES, torch.float32), 3)  # noqa: B023
        split = parameters(SIZES, torch.float32)
        apart = case.make(_split(split, sizes), **options)
        for step in range(3):
            set_grads(split, step)
            apart.step()
        assert_same_training(apart, whole, f"{case.name} in groups of {sizes}")


def test_groups_with_rates_of_their_own_share_a_launch() -> None:
    params, others = parameters(SIZES, torch.float32), parameters(SIZES, torch.float32)
    groups = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(params)]
    together = stepwell.AdamW(groups, weight_decay=0.1)
    apart = [stepwell.AdamW([p], lr=0.01 * (i + 1), weight_decay=0.1) for i, p in enumerate(others)]
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        for optimizer in (together, *apart):
            optimizer.step()
    assert len(together._held[0].describe()) == 1
    for i, (param, other) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(param, other, f"parameter {i}")


def test_parameters_at_different_step_counts_share_a_launch() -> None:
    params, others = parameters(SIZES, torch.float32), parameters(SIZES, torch.float32)
    together, apart = stepwell.Adam(params), [stepwell.Adam([p]) for p in others]
    for step in range(4):
        for i, (param, other) in enumerate(zip(params, others, strict=True)):
            set_grads([param], step, seed=i)
            set_grads([other], step, seed=i)
            if step < i:
                param.grad = other.grad = None
        for optimizer in (together, *apart):
            optimizer.step()
    assert [float(together.state[p].get("step", -1)) for p in params] == [4, 3, 2, 1, -1, -1]
    for i, (param, other) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(param, other, f"parameter {i}")


# Reductions


def _filling(reduce: Any) -> type[Any]:
    """A rule that turns every element of the parameter into a reduction of its gradient."""

    class Filling(stepwell.Optimizer):
        @staticmethod
        def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
            return 0 * param + reduce(grad)

    return Filling


# the same of a tensor in float64
REDUCTIONS: dict[str, tuple[Any, Any]] = {
    "sum": (total, torch.sum),
    "mean": (mean, torch.mean),
    "norm": (norm, torch.linalg.vector_norm),
    "amax": (amax, torch.amax),
}
TOTALS: dict[str, tuple[Any, Any]] = {name: REDUCTIONS[name] for name in ("sum", "mean", "norm")}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", **named(FLOATS))
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_those_of_float64(name: str, dtype: torch.dtype) -> None:
    ours, truth = REDUCTIONS[name]
    for fused in (True, False):
        params = parameters(((50_000,), (3, 5), (1,)), dtype)
        optimizer = train(lambda p: _filling(ours)(p, fused=fused), params, 1)  # noqa: B023
        assert backends(optimizer) == {NATIVE if fused else "eager"}
        for i, param in enumerate(params):
            assert param.grad is not None
            value = truth(param.grad.double())
            # one rounding of the result; the squares of a norm have been rounded before. A sum of
            # 50,000 terms in float64 has as many roundings, in an order that the width of the
            # processor's registers decides, as torch's own has: some ULP of one that cancels
            expected = value.expand(param.shape).to(dtype)
            limit = 16 if dtype is torch.float64 and name in ("sum", "mean") else 1
            what = f"{name} of parameter {i}, fused={fused}"
            assert_within(param.detach(), expected, limit, what)


@pytest.mark.parametrize("fused", [True, False])
def test_reductions_of_nothing(fused: bool) -> None:
    expected = {"sum": 0.0, "norm": 0.0, "amax": -torch.inf}
    for name, value in expected.items():

        class Recorded(stepwell.Optimizer):
            seen = zeros(scalar=True)

            @staticmethod
            def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
                state.seen = state.seen + REDUCTIONS[name][0](grad)  # noqa: B023
                return param

        optimizer = train(
            lambda p: Recorded(p, fused=fused), parameters(((0, 3),), torch.float32), 1
        )
        assert [float(s["seen"]) for s in optimizer.state.values()] == [value]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("across", ["group", "all"])
@pytest.mark.parametrize("name", TOTALS)
def test_totals_are_those_of_float64(name: str, across: str) -> None:
    ours, truth = TOTALS[name]
    rule = _filling(lambda grad: ours(grad, across=across))
    shapes = ((30_000,), (3, 5), (1,), (40, 50), (7,))
    results = []
    for count, options in ((2, {}), (1, {}), (1, {"foreach": False})):
        torch.set_num_threads(count)
        # half of them in float64, so that a total joins two launches
        params = [
            p.double() if i % 2 else p for i, p in enumerate(parameters(shapes, torch.float32))
        ]
        params = [torch.nn.Parameter(p.detach()) for p in params]
        optimizer = rule([{"params": params[:2]}, {"params": params[2:]}], **options)
        set_grads(params, 0)
        optimizer.step()
        assert backends(optimizer) == {"eager" if options else NATIVE}
        members = {0: params[:2], 1: params[2:]} if across == "group" else {0: params}
        for index, some in members.items():
            value = truth(torch.cat([p.grad.double().reshape(-1) for p in some]))
            for param in some:
                expected = value.expand(param.shape).to(param.dtype)
                # squares are rounded to float32 before they are added
                limit = 2**30 if param.dtype is torch.float64 else 1
                assert_within(param.detach(), expected, limit, f"{name} across {across} {index}")
        results.append(snapshot(optimizer))
    assert_same_training(results[0], results[1], "1 and 2 threads")


@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 2, 2), (5, 0, 1)])
def test_a_total_over_all_does_not_depend_on_groups(sizes: tuple[int, ...]) -> None:
    clipped = stepwell.compose(stepwell.SGD, stepwell.language.ClipNorm)
    whole = train(lambda p: clipped(p, lr=0.1), parameters(SIZES, torch.float32), 2)
    split = parameters(SIZES, torch.float32)
    apart = clipped(_split(split, sizes), lr=0.1)
    for step in range(2):
        set_grads(split, step)
        apart.step()
    assert_same_training(apart, whole, f"clipped, in groups of {sizes}")


@pytest.mark.parametrize("fused", [True, False])
def test_a_total_does_not_depend_on_the_order(fused: bool) -> None:
    """In float64, and of enough parameters for a sum in another order to be another number."""
    rule = _filling(lambda grad: total(grad, across="all"))
    found = set()
    for order in (range(40), range(39, -1, -1), [*range(1, 40, 2), *range(0, 40, 2)]):
        params = parameters(((3,),) * 40, torch.float64)
        set_grads(params, 0)
        rule([params[i] for i in order], fused=fused).step()
        found |= {x for param in params for x in param.tolist()}
    assert len(found) == 1


def test_a_total_over_a_group_does_not_depend_on_the_order() -> None:
    forward = train(lambda p: Prodigy(p, d0=0.1), parameters(MATRICES, torch.float32), 1)
    params = parameters(MATRICES, torch.float32)
    set_grads(params, 0)
    backward = Prodigy(params[::-1], d0=0.1)
    backward.step()
    first, last = list(forward.state.values()), list(backward.state.values())[::-1]
    for one, other in zip(first, last, strict=True):
        assert_same_bits(one["d"], other["d"], "d")
        assert_same_bits(one["s"], other["s"], "s")


# NaN and rounding to bfloat16

# the payload that GPUs write, others that rounding up would carry away, and signalling ones
STRANGE = (0x7FFFFFFF, -1, 0x7FFF8000, 0x7FFFC000, 0x7F800001, -0x7FFFFF, 0x7FC00000)


@pytest.mark.tiny
def test_every_bfloat16_comes_through_a_step() -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    if is_interpreting():
        # Triton's interpreter reads subnormal bfloat16 as other numbers, or as zero
        values = values[(values == 0) | ~(values.abs() < torch.finfo(values.dtype).tiny)]
    param = torch.nn.Parameter(torch.zeros_like(values))
    param.grad = values
    stepwell.SGD([param], lr=1.0).step()
    # 0 - 0 is 0, whatever the sign
    torch.testing.assert_close(param.detach(), -param.grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.tiny
@pytest.mark.parametrize("dtype", **named((torch.float32, torch.float16)))
@pytest.mark.parametrize(
    ("rule", "name"), [(stepwell.AdamW, "exp_avg"), (stepwell.RMSprop, "momentum_buffer")]
)
def test_no_nan_of_wider_state_is_rounded_to_a_number(
    rule: Any, name: str, dtype: torch.dtype
) -> None:
    nans = torch.tensor(STRANGE, dtype=torch.int32).repeat(5).view(torch.float32)
    if dtype is torch.float16:
        nans = torch.tensor((0x7FFF, -1, 0x7C01, 0x7E00), dtype=torch.int16).view(dtype).repeat(9)
    param = torch.nn.Parameter(torch.zeros(len(nans), dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = rule([param], **({"momentum": 0.9} if name == "momentum_buffer" else {}))
    optimizer.init_state()
    optimizer.state[param][name] = nans.clone()
    optimizer.step()
    assert param.isnan().all()
    assert optimizer.state[param][name].isnan().all()


@pytest.mark.tiny
@pytest.mark.parametrize("bits", STRANGE)
def test_no_nan_among_the_numbers_is_rounded_to_one(bits: int) -> None:
    param = torch.nn.Parameter(torch.zeros(40, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = stepwell.AdamW([param])
    optimizer.init_state()
    optimizer.state[param]["step"].view(torch.int32).fill_(bits)
    optimizer.step()
    assert param.isnan().all()
