"""Does a step on a GPU do what it does on a CPU, and what torch's own classes do there?

Numbers are drawn on the CPU and moved, so that they are the same everywhere, and results are
compared there. The reference is eager on the CPU, or torch's class of the same name on the GPU.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import stepwell
from stepwell.checkpoint import load, save
from stepwell.language import ClipNorm, Decay, NonNegative, lerp, zeros
from stepwell.language import sum as total
from stepwell.native.triton_jit import is_interpreting

from .cases import (
    CASES,
    FLOATS,
    PLAIN,
    SIZES,
    Case,
    Shapes,
    named,
    numbers,
    parameters,
    per_element,
    set_grads,
)
from .compare import (
    Entry,
    assert_same_bits,
    assert_same_training,
    assert_training_within,
    backends,
    everything,
)
from .rules import LAMB, RULES, Factored, Prodigy

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or is_interpreting(),
        reason="needs a CUDA GPU, and Triton's compiler",
    ),
]

DEVICE = "cuda"

# For the reasons that tests/test_backends.py gives, and wider: there are more elements, of which
# the unluckiest counts, and in float64 the powers that a GPU computes may be a ULP or two off, of
# which 1 - beta**step makes more.
LIMITS = {
    torch.float32: 16,
    torch.float64: 32,
    torch.bfloat16: 2,
    torch.float16: 2,
    torch.complex64: 16,
}
# A norm comes before the elementwise part, so that its rounding reaches every element; and a small
# difference of gradients is multiplied where a rule looks at their change.
RULE_LIMITS = {torch.float32: 256, torch.float64: 256, torch.bfloat16: 8, torch.float16: 8}
# Torch's loop and its kernels, and ours, each round at other places: a random walk of a rounding or
# so per step, over some twenty steps.
TWIN_LIMIT = 64

SMALL: Shapes = ((7,), (10, 100), (), (1,))
MATRICES: Shapes = ((3, 4), (7, 5), (1, 1), (0, 3), (200, 300))
# what lacks an operation on foreach: those with a reduction
REDUCING = {"LAMB", "LARS", "Prodigy", "MARS", "CautiousAdamW", "SignedMax", "Factored"}

Clipped = stepwell.compose(stepwell.AdamW, ClipNorm)
ClippedSGD = stepwell.compose(stepwell.SGD, ClipNorm)

Make = Callable[..., Any]
FLAGS: Mapping[str, dict[str, bool]] = {"default": {}, "fused": {"fused": True}}


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    """What goes wrong on the device is said late: wait for it, so that the right test says it."""
    yield
    torch.cuda.synchronize()


# Training on a device


def moved(tensors: Sequence[Tensor], device: str = DEVICE) -> list[Parameter]:
    """Parameters with these numbers, on a device."""
    return [Parameter(tensor.detach().to(device, copy=True)) for tensor in tensors]


def drawn(shapes: Shapes = SMALL, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters on the GPU."""
    return moved(parameters(shapes, dtype))


def layouts(dtype: torch.dtype, device: str = DEVICE) -> list[Parameter]:
    """Parameters of many sizes, one at an odd address, and one that is transposed."""
    odd = numbers((5001,), dtype, 71).to(device)[1:]
    turned = numbers((30, 40), dtype, 72).to(device).t()
    return [*moved(parameters(SIZES, dtype), device), Parameter(odd), Parameter(turned)]


def gradients(params: Sequence[Tensor], step: int, scale: float = 1.0) -> list[Tensor]:
    """The gradients of this step, each where its parameter is."""
    likes = [torch.empty(param.shape, dtype=param.dtype) for param in params]
    set_grads(likes, step, scale=scale)
    return [
        like.grad.to(param.device)
        for like, param in zip(likes, params, strict=True)
        if like.grad is not None
    ]


def give(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    """Give each parameter a new tensor with the gradient of this step."""
    for param, grad in zip(params, gradients(params, step, scale), strict=True):
        param.grad = grad


def refill(grads: Sequence[Tensor], step: int) -> None:
    """The gradients of this step, in memory that is there already."""
    for grad, new in zip(grads, gradients(grads, step), strict=True):
        grad.copy_(new)


def trained(make: Make, params: Sequence[Tensor], steps: int, *, first: int = 0) -> Any:
    """An optimizer for these parameters after some steps."""
    optimizer = make(list(params))
    for step in range(first, first + steps):
        give(params, step)
        optimizer.step()
    return optimizer


def on_host(optimizer: Any) -> Mapping[Entry, Tensor]:
    """A copy, on the CPU, of all that an optimizer has trained."""
    if isinstance(optimizer, Mapping):
        return optimizer
    return {e: t.to("cpu", copy=True) for e, t in everything(optimizer).items()}


def assert_near(actual: Any, expected: Any, limit: float, what: str) -> None:
    __tracebackhide__ = True
    assert_training_within(on_host(actual), on_host(expected), limit, what)


def assert_equal(actual: Any, expected: Any, what: str) -> None:
    __tracebackhide__ = True
    assert_same_training(on_host(actual), on_host(expected), what)


# The same numbers as on a CPU


def takes(rule: Any, flag: str) -> bool:
    """Whether a class has such an argument; torch's have not all the same."""
    return flag in inspect.signature(rule).parameters


def check_kernels(case: Case, dtype: torch.dtype) -> None:
    __tracebackhide__ = True
    reference = trained(lambda p: case.make(p, foreach=False), layouts(dtype, "cpu"), 4)
    for name, flags in FLAGS.items():
        found = trained(lambda p: case.make(p, **flags), layouts(dtype), 4)  # noqa: B023
        assert backends(found) == {"triton"}
        assert_near(found, reference, LIMITS[dtype], f"{case.name}, {name}")


@pytest.mark.parametrize("case", **named(per_element(CASES)))
def test_kernels_do_what_the_formula_says(case: Case) -> None:
    check_kernels(case, torch.float32)


@pytest.mark.parametrize("dtype", **named((*FLOATS[1:], torch.complex64)))
@pytest.mark.parametrize("case", **named(per_element(PLAIN)))
def test_kernels_for_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    check_kernels(case, dtype)


# one after the other, but hundreds of kernels are compiled
@pytest.mark.slow
@pytest.mark.parametrize("dtype", **named(FLOATS[1:]))
@pytest.mark.parametrize(
    "case", **named([case for case in per_element(CASES) if case not in PLAIN])
)
def test_kernels_for_every_flag_and_dtype(case: Case, dtype: torch.dtype) -> None:
    check_kernels(case, dtype)


@pytest.mark.parametrize("dtype", **named(FLOATS))
@pytest.mark.parametrize("rule", RULES)
def test_rules_from_outside(rule: type[Any], dtype: torch.dtype) -> None:
    # Prodigy starts from steps of 1e-6, which half precision would round away
    options = {"d0": 1e-2} if rule is Prodigy else {}
    values = parameters(MATRICES, dtype)
    reference = trained(lambda p: rule(p, foreach=False, **options), moved(values, "cpu"), 5)
    for name, flags in FLAGS.items():
        found = trained(lambda p: rule(p, **flags, **options), moved(values), 5)  # noqa: B023
        # rows and columns are not lowered yet
        assert backends(found) == ({"eager"} if rule is Factored else {"triton"})
        assert_near(found, reference, RULE_LIMITS[dtype], f"{rule.__name__}, {name}")


@pytest.mark.parametrize("name", ["foreach", "eager"])
@pytest.mark.parametrize("dtype", **named((*FLOATS, torch.complex64)))
@pytest.mark.parametrize("case", **named(per_element(PLAIN)))
def test_the_other_back_ends(case: Case, dtype: torch.dtype, name: str) -> None:
    reference = trained(lambda p: case.make(p, foreach=False), layouts(dtype, "cpu"), 4)
    found = trained(lambda p: case.make(p, foreach=name == "foreach"), layouts(dtype), 4)
    assert backends(found) == {name}
    assert_near(found, reference, LIMITS[dtype], f"{case.name} on {name}")


@pytest.mark.parametrize("name", ["foreach", "eager"])
@pytest.mark.parametrize("dtype", **named((torch.float32, torch.float64)))
@pytest.mark.parametrize("rule", RULES)
def test_the_other_back_ends_run_rules_from_outside(
    rule: type[Any], dtype: torch.dtype, name: str
) -> None:
    options = {"d0": 1e-2} if rule is Prodigy else {}
    values = parameters(MATRICES, dtype)
    reference = trained(lambda p: rule(p, foreach=False, **options), moved(values, "cpu"), 5)
    found = trained(lambda p: rule(p, foreach=name == "foreach", **options), moved(values), 5)
    assert backends(found) == {"eager" if rule.__name__ in REDUCING else name}
    assert_near(found, reference, RULE_LIMITS[dtype], f"{rule.__name__} on {name}")


@pytest.mark.parametrize("case", **named(per_element(PLAIN)))
def test_extreme_gradients(case: Case) -> None:
    """NaN, infinities, subnormal and huge numbers go where they go on a CPU."""
    values = [0.0, -0.0, 1e-45, -1e-38, 1e38, -1e38, torch.inf, -torch.inf, torch.nan, 1e-20] * 200
    results = []
    for device, flags in (("cpu", {"foreach": False}), (DEVICE, {}), (DEVICE, {"fused": True})):
        param = Parameter(torch.ones(len(values), device=device))
        optimizer = case.make([param], **flags)
        for _ in range(3):
            param.grad = torch.tensor(values, device=device)
            optimizer.step()
        results.append(param.detach().cpu())
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], equal_nan=True)


# The same bits, however parameters lie and are grouped


def split(params: Sequence[Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [{"params": list(params[a:b])} for a, b in pairwise(bounds)]


@pytest.mark.parametrize("flags", **named(tuple(FLAGS)))
@pytest.mark.parametrize("case", **named(per_element(PLAIN)))
def test_same_bits_for_any_split_into_groups(case: Case, flags: str) -> None:
    options = FLAGS[flags]
    whole = trained(lambda p: case.make(p, **options), layouts(torch.float32), 3)
    for sizes in ((1, 7), (2, 2, 4), (1,) * 8, (5, 0, 3)):
        apart = trained(
            lambda p: case.make(split(p, sizes), **options),  # noqa: B023
            layouts(torch.float32),
            3,
        )
        assert_equal(apart, whole, f"{case.name} in groups of {sizes}")


def shifted(tensor: Tensor, by: int) -> Tensor:
    """The same numbers, `by` elements after an address that is a multiple of 16 bytes."""
    room = torch.full((tensor.numel() + by,), torch.nan, dtype=tensor.dtype, device=DEVICE)
    room[by:] = tensor.to(DEVICE)
    return room[by:]


@pytest.mark.parametrize("dtype", **named((torch.float32, torch.float64, torch.bfloat16)))
@pytest.mark.parametrize("rule", [stepwell.AdamW, LAMB, ClippedSGD])
def test_same_bits_wherever_memory_lies(rule: type[Any], dtype: torch.dtype) -> None:
    shapes: Shapes = ((40_000,), (1024,), (999,), (16_385,))
    results = []
    for of_params, of_grads in ((0, 0), (1, 0), (0, 3), (1, 1)):
        params = [Parameter(shifted(p.detach(), of_params)) for p in parameters(shapes, dtype)]
        optimizer = rule(params, lr=0.02)
        for step in range(3):
            for param, grad in zip(params, gradients(params, step), strict=True):
                param.grad = shifted(grad, of_grads)
            optimizer.step()
        assert backends(optimizer) == {"triton"}
        results.append(on_host(optimizer))
    for found in results[1:]:
        assert_equal(found, results[0], rule.__name__)


@pytest.mark.parametrize("sizes", [(150, 450), (1,) * 600, (0, 300, 0, 300), (200,) * 3, (75,) * 8])
def test_a_total_over_all_does_not_depend_on_groups(sizes: tuple[int, ...]) -> None:
    """In float64, and of enough parameters for a sum in another order to be another number."""
    shapes: Shapes = ((3,),) * 600

    def make(params: Any) -> Any:
        return ClippedSGD(params, lr=0.1, max_norm=0.5)

    whole = trained(make, drawn(shapes, torch.float64), 2)
    apart = trained(lambda p: make(split(p, sizes)), drawn(shapes, torch.float64), 2)
    assert_equal(apart, whole, "clipped")


class GroupTotal(stepwell.Optimizer):
    """Every element becomes what the gradients of its group add up to."""

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        return 0 * param + total(grad, across="group")


def test_a_total_over_a_group_does_not_depend_on_the_others() -> None:
    shapes: Shapes = ((3,),) * 200
    alone = trained(GroupTotal, drawn(shapes, torch.float64), 1)
    more = drawn((*shapes, *[(2,)] * 700), torch.float64)
    beside = trained(lambda p: GroupTotal(split(p, (200, 699, 1))), more, 1)
    found, expected = on_host(beside), on_host(alone)
    for entry, tensor in expected.items():
        assert_same_bits(found[entry], tensor, f"a group of 200 beside others: {entry}")


def test_a_total_does_not_depend_on_the_order() -> None:
    found = set()
    for order in (range(300), range(299, -1, -1), [*range(1, 300, 2), *range(0, 300, 2)]):
        params = drawn(((3,),) * 300, torch.float64)
        give(params, 0)
        GroupTotal([params[i] for i in order]).step()
        found |= set(torch.cat([p.detach() for p in params]).tolist())
    assert len(found) == 1


@pytest.mark.parametrize("flags", **named(tuple(FLAGS)))
def test_clipping_joins_launches_of_several_dtypes(flags: str) -> None:
    def mixed(device: str) -> list[Parameter]:
        dtypes = (torch.float32, torch.bfloat16, torch.float64)
        return [p for d in dtypes for p in moved(parameters(SMALL, d), device)]

    found = trained(lambda p: Clipped(p, max_norm=0.5, **FLAGS[flags]), mixed(DEVICE), 3)
    expected = trained(lambda p: Clipped(p, max_norm=0.5), mixed("cpu"), 3)
    assert len(found._held[0].describe()) == 3
    for index, (param, other) in enumerate(
        zip(found.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True)
    ):
        # squares of float32 are rounded before they are added, so that float64 is no closer
        rtol = {torch.bfloat16: 2**-7}.get(param.dtype, 1e-6)
        with_index = f"parameter {index}: {{}}".format
        torch.testing.assert_close(
            param.detach().cpu(), other.detach(), rtol=rtol, atol=1e-7, msg=with_index
        )


# Torch's own classes


def has_tensors(case: Case) -> bool:
    """Whether a rate is a tensor, which torch does not take everywhere."""
    values = case.options.values()
    spread = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    return any(map(torch.is_tensor, spread))


TWINS = [case for case in per_element(CASES) if case.twin is not None and not has_tensors(case)]


@pytest.mark.parametrize("case", **named(TWINS))
def test_numbers_are_torchs(case: Case) -> None:
    forms = [form for form in ("fused", "foreach") if takes(case.twin, form)]
    theirs = {
        form: on_host(trained(lambda p: case.make_twin(p, **{form: True}), drawn(), 20))  # noqa: B023
        for form in forms
    }
    for name, flags in FLAGS.items():
        ours = trained(lambda p: case.make(p, **flags), drawn(), 20)  # noqa: B023
        for form, expected in theirs.items():
            assert_near(ours, expected, TWIN_LIMIT, f"{case.name}, {name}, torch {form}")


FORMS: Mapping[str, dict[str, bool]] = {
    "default": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
}
STATES = [
    pytest.param(case, flags, id=f"{case.name}-{name}")
    for case in per_element(PLAIN)
    for name, flags in FORMS.items()
    if case.twin is not None and all(takes(case.twin, flag) for flag in flags)
]


def kinds(optimizer: Any) -> list[dict[str, Any]]:
    """What each entry of the state is; torch lists a momentum that it will never have as None."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    entries = [optimizer.state.get(param, {}).items() for param in params]
    return [
        {name: (t.dtype, t.shape, t.stride()) for name, t in entry if t is not None}
        for entry in entries
    ]


def homes(optimizer: Any, *, counts: bool) -> set[str]:
    """Where state lies: what a parameter has one number of, or the rest."""
    entries = [state.values() for param, state in optimizer.state.items() if param.dim()]
    tensors = [value for entry in entries for value in entry if value is not None]
    return {tensor.device.type for tensor in tensors if (tensor.dim() == 0) is counts}


@pytest.mark.parametrize(("case", "flags"), STATES)
def test_state_is_torchs(case: Case, flags: dict[str, bool]) -> None:
    """Names and kinds; and a count is on the GPU if fused or capturable, else not."""
    for steps in (1, 2):
        ours = trained(lambda p: case.make(p, **flags), drawn(), steps)
        theirs = trained(lambda p: case.make_twin(p, **flags), drawn(), steps)
        assert kinds(ours) == kinds(theirs)
        for optimizer in (ours, theirs):
            assert homes(optimizer, counts=False) <= {DEVICE}
        home = DEVICE if flags.keys() & {"fused", "capturable"} else "cpu"
        assert homes(ours, counts=True) <= {home}
        # torch keeps those of ASGD on the GPU whatever the flags
        if case.twin is not torch.optim.ASGD:
            assert homes(theirs, counts=True) <= {home}


@pytest.mark.parametrize(("case", "flags"), STATES)
def test_state_dicts_go_both_ways(case: Case, flags: dict[str, bool]) -> None:
    for make, other in ((case.make, case.make_twin), (case.make_twin, case.make)):
        first = trained(lambda p: make(p, **flags), drawn(), 2)  # noqa: B023
        params = moved([p for group in first.param_groups for p in group["params"]])
        second = other(params, **flags)
        # torch's class goes on with the very tensors that it is given
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for step in range(2, 4):
            for optimizer in (first, second):
                give(optimizer.param_groups[0]["params"], step)
                optimizer.step()
        assert kinds(first) == kinds(second)
        assert_near(second, first, TWIN_LIMIT, f"{case.name}: {type(second).__module__}")


def test_a_state_dict_from_a_cpu() -> None:
    for name, flags in FORMS.items():
        before = trained(stepwell.AdamW, moved(parameters(SMALL, torch.float32), "cpu"), 2)
        file = io.BytesIO()
        torch.save(before.state_dict(), file)
        file.seek(0)
        params = moved(before.param_groups[0]["params"])
        after = stepwell.AdamW(params, **flags)
        after.load_state_dict(torch.load(file, map_location="cpu"))
        for step in range(2, 4):
            give(params, step)
            after.step()
            give(before.param_groups[0]["params"], step)
            before.step()
        home = DEVICE if name in ("fused", "capturable") else "cpu"
        for param in params:
            assert after.state[param]["step"].device.type == home
            assert after.state[param]["exp_avg"].device == param.device
        assert_near(after, before, 16, f"saved on a CPU, {name}")


def test_counts_move_when_flags_change() -> None:
    params, others = drawn(), drawn()
    changing, steady = stepwell.AdamW(params), stepwell.AdamW(others)
    found = []
    for step, (key, value) in enumerate(
        [("fused", None), ("capturable", True), ("capturable", False), ("fused", True)]
    ):
        changing.param_groups[0][key] = value
        for optimizer, mine in ((changing, params), (steady, others)):
            give(mine, step)
            optimizer.step()
        found += homes(changing, counts=True)
        assert backends(changing) == {"triton"}
    assert found == ["cpu", DEVICE, "cpu", DEVICE]
    assert_near(changing, steady, 16, "flags that change")


# Loss scaling


def scaled(
    optimizer: Any, steps: int, overflows: Sequence[int], *, unscale: bool = False
) -> list[float]:
    """Step with a GradScaler; in some steps a gradient is infinite. Returns the scales."""
    params = optimizer.param_groups[0]["params"]
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=3)
    scaler.scale(torch.ones((), device=DEVICE))
    scales = []
    for step in range(steps):
        give(params, step, scale=scaler.get_scale())
        if step in overflows:
            params[1].grad.view(-1)[3] = torch.inf
        before = on_host(optimizer)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if step in overflows:
            after = on_host(optimizer)
            made = {entry for entry in after.keys() - before.keys() if after[entry].any()}
            assert not made, "a step that was skipped made state that is not zero"
            assert_equal({e: after[e] for e in before}, before, f"step {step}, skipped")
        assert "found_inf" not in vars(optimizer)
        assert "grad_scale" not in vars(optimizer)
    return scales


@pytest.mark.parametrize(
    ("overflows", "unscale"),
    [((), False), ((2, 5), False), ((2, 5), True), ((0, 1, 4), False)],
    ids=str,
)
@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("case", **named(per_element(PLAIN)))
def test_a_scaler(case: Case, name: str, overflows: Sequence[int], unscale: bool) -> None:
    flags = FLAGS[name]
    ours, plain = case.make(drawn(), **flags), case.make(drawn(), **flags)
    scales = scaled(ours, 8, overflows, unscale=unscale)
    assert backends(ours) == {"triton"}
    for step in sorted(set(range(8)) - set(overflows)):
        give(plain.param_groups[0]["params"], step)
        plain.step()
    # scales are powers of two, which rounding does not notice
    assert_near(ours, plain, 2, f"{case.name}, scaled")
    # torch's fused SGD takes up uninitialised memory if its first step is skipped
    if all(takes(case.twin, flag) for flag in flags) and not (flags and 0 in overflows):
        theirs = case.make_twin(drawn(), **flags)
        assert scales == scaled(theirs, 8, overflows, unscale=unscale)
        assert_near(ours, theirs, TWIN_LIMIT, f"{case.name}, torch")


def test_a_scaler_of_two_optimizers_one_of_which_has_no_gradients() -> None:
    first, second = (trained(lambda p: stepwell.AdamW(p, fused=True), drawn(), 1) for _ in range(2))
    second.zero_grad()
    before = on_host(second)
    scaler = torch.amp.GradScaler(DEVICE)
    scaler.scale(torch.ones((), device=DEVICE))
    for optimizer in (first, second):
        scaler.step(optimizer)
    scaler.update()
    assert_equal(second, before, "a step without gradients")


def test_counts_are_of_steps_that_were_taken() -> None:
    optimizer = stepwell.AdamW(drawn(), fused=True)
    scaled(optimizer, 6, (1, 2, 4))
    assert {state["step"].item() for state in optimizer.state.values()} == {3.0}


# No step waits for the device


@contextmanager
def never_waiting() -> Iterator[None]:
    """In this context torch refuses to wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # torch warns that it does not notice everything that waits
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def rate(value: float = 0.02) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def variants(form: str, flags: Callable[[Case], dict[str, bool]]) -> dict[str, Make]:
    """One maker of each rule, with some flags."""

    def make(case: Case) -> Make:
        return lambda params: case.make(params, **flags(case))

    return {f"{case.name} {form}": make(case) for case in per_element(PLAIN)}


QUIET: Mapping[str, Make] = {
    **variants("default", lambda case: {}),
    **variants("fused", lambda case: {"fused": True}),
    "AdamW capturable": lambda p: stepwell.AdamW(p, capturable=True),
    "AdamW with a rate on the device": lambda p: stepwell.AdamW(p, lr=rate()),
    "AdamW with betas on the device": lambda p: stepwell.AdamW(
        p, lr=rate(), betas=(rate(0.9), rate(0.99))
    ),
    "SGD with a rate on the device": lambda p: stepwell.SGD(p, lr=rate(), momentum=0.9),
    "LAMB": LAMB,
    "Prodigy": Prodigy,
    "AdamW clipped": lambda p: Clipped(p, max_norm=0.5),
    "AdamW clipped, fused": lambda p: Clipped(p, max_norm=0.5, fused=True),
    "AdamW clipped, with a limit on the device": lambda p: Clipped(p, max_norm=rate(0.5)),
}


def test_waiting_is_noticed() -> None:
    with never_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones((), device=DEVICE).item()


@pytest.mark.parametrize("name", QUIET)
def test_no_step_waits(name: str) -> None:
    # of two dtypes, so that totals join launches
    params = [*drawn(), *drawn(dtype=torch.bfloat16)]
    optimizer = QUIET[name](params)
    group = optimizer.param_groups[0]
    give(params, 0)
    optimizer.step()
    for step in range(1, 6):
        give(params, step)
        if step == 3:
            params[1].grad = None
        with never_waiting():
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(0.01 * step)
            else:
                group["lr"] = 0.01 * step
            optimizer.step()
    assert backends(optimizer) == {"triton"}
    assert all(bool(param.isfinite().all()) for param in params)


@pytest.mark.parametrize("rule", [stepwell.AdamW, Clipped, ClippedSGD])
def test_no_scaled_step_waits(rule: type[Any]) -> None:
    params = drawn()
    optimizer = trained(lambda p: rule(p, fused=True), params, 1)
    for step in range(1, 4):
        give(params, step)
        before = on_host(optimizer)
        scale, found_inf = rate(8.0), torch.full((), float(step == 2), device=DEVICE)
        with never_waiting():
            optimizer.grad_scale, optimizer.found_inf = scale, found_inf
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        if step == 2:
            assert_equal(optimizer, before, "a step that was skipped")


# Graphs


@contextmanager
def aside() -> Iterator[torch.cuda.Stream]:
    """A stream of its own, after what was queued before, and before what comes later."""
    now, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(now)
    with torch.cuda.stream(side):
        yield side
    now.wait_stream(side)


def warm(optimizer: Any, steps: int) -> None:
    """Steps before a capture, on another stream, as torch wants them."""
    with aside():
        for step in range(steps):
            give(optimizer.param_groups[0]["params"], step)
            optimizer.step()


def captured(optimizer: Any) -> torch.cuda.CUDAGraph:
    """A graph of one step, on the gradients that are there now."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def for_graphs(case: Case) -> dict[str, bool]:
    """What keeps counts on the device: torch has no `capturable` where it could not be true."""
    return {"capturable" if takes(case.rule, "capturable") else "fused": True}


GRAPHED: Mapping[str, Make] = {
    **variants("captured", for_graphs),
    "SGD": lambda p: stepwell.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: stepwell.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: stepwell.AdamW(p, lr=0.02, capturable=True),
    "LAMB": lambda p: LAMB(p, capturable=True),
    "Prodigy": lambda p: Prodigy(p, d0=1e-2, capturable=True),
    "AdamW clipped": lambda p: Clipped(p, max_norm=0.5, capturable=True),
}


@pytest.mark.parametrize("name", GRAPHED)
def test_replays_are_steps(name: str) -> None:
    params, others = layouts(torch.float32), layouts(torch.float32)
    graphed, plain = GRAPHED[name](params), GRAPHED[name](others)
    warm(graphed, 2)
    for step in range(2):
        give(others, step)
        plain.step()
    graph = captured(graphed)
    assert_equal(graphed, plain, f"{name}: a capture is no step")
    static = [param.grad for param in params]
    for step in range(2, 6):
        refill(static, step)
        graph.replay()
        give(others, step)
        plain.step()
    assert_equal(graphed, plain, f"{name}: replays")


@pytest.mark.parametrize("name", GRAPHED)
def test_steps_between_replays(name: str) -> None:
    params, others = drawn(), drawn()
    graphed, plain = GRAPHED[name](params), GRAPHED[name](others)
    warm(graphed, 2)
    for step in range(2):
        give(others, step)
        plain.step()
    graph = captured(graphed)
    static = [param.grad for param in params]
    for step, replays in enumerate((False, True, True, False, False, True), 2):
        if replays:
            refill(static, step)
            graph.replay()
        else:
            # gradients elsewhere: the graph goes on with its own
            give(params, step)
        give(others, step)
        if step == 5:
            params[1].grad = others[1].grad = None
        if not replays:
            graphed.step()
        plain.step()
        assert_equal(graphed, plain, f"{name}, step {step}")


def test_a_replay_obeys_a_rate_on_the_device() -> None:
    for make in (stepwell.AdamW, lambda p, **f: stepwell.SGD(p, f["lr"], momentum=0.9)):
        params, others = drawn(), drawn()
        graphed, plain = (make(p, lr=rate(), capturable=True) for p in (params, others))
        warm(graphed, 2)
        for step in range(2):
            give(others, step)
            plain.step()
        graph = captured(graphed)
        static = [param.grad for param in params]
        for step, value in enumerate((0.05, 0.0, 0.3), 2):
            for optimizer in (graphed, plain):
                optimizer.param_groups[0]["lr"].fill_(value)
            refill(static, step)
            graph.replay()
            give(others, step)
            plain.step()
            assert_equal(graphed, plain, f"{type(graphed).__name__}, lr {value}")


def test_two_graphs_of_one_optimizer() -> None:
    """Captured one after the other, each with gradients of its own."""
    params, others = drawn(), drawn()
    graphed, plain = (stepwell.AdamW(p, capturable=True) for p in (params, others))
    warm(graphed, 1)
    give(others, 0)
    plain.step()
    graphs = []
    for step in (1, 2):
        give(params, step)
        graphs.append((captured(graphed), [param.grad for param in params]))
    for step in range(1, 6):
        graph, static = graphs[step % 2]
        refill(static, step)
        graph.replay()
        give(others, step)
        plain.step()
    assert_equal(graphed, plain, "two graphs")


@pytest.mark.parametrize(("name", "reload"), [("SGD with momentum", False), ("AdamW", True)])
def test_a_plan_is_not_made_in_a_capture(name: str, reload: bool) -> None:
    """The formula of SGD is another one from its second step on; so is the state once loaded."""
    params, others = drawn(), drawn()
    graphed, plain = GRAPHED[name](params), GRAPHED[name](others)
    warm(graphed, 1)
    give(others, 0)
    plain.step()
    if reload:
        graphed.load_state_dict(graphed.state_dict())
    give(params, 1)
    graph, scratch = torch.cuda.CUDAGraph(), torch.zeros(1, device=DEVICE)
    with torch.cuda.graph(graph):
        # torch warns of an empty graph
        scratch.add_(1)
        with pytest.raises(RuntimeError, match="one more step like this before the capture"):
            graphed.step()
    assert_equal(graphed, plain, name)
    for step in (1, 2):
        give(params, step)
        give(others, step)
        graphed.step()
        plain.step()
    assert_equal(graphed, plain, name)


def network() -> torch.nn.Module:
    torch.manual_seed(3)
    layers = torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4)
    return torch.nn.Sequential(*layers).to(DEVICE)


def test_a_whole_step_of_training_in_a_graph() -> None:
    inputs = numbers((32, 16), torch.float32, 5).to(DEVICE)
    models = network(), network()
    graphed, plain = (
        Clipped(model.parameters(), lr=0.01, eps=1e-3, max_norm=0.5, capturable=True)
        for model in models
    )

    def train_once(model: torch.nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()

    graph = torch.cuda.CUDAGraph()
    with aside() as side:
        for _ in range(3):
            train_once(models[0], graphed)
    with torch.cuda.graph(graph, stream=side):
        train_once(models[0], graphed)
    for _ in range(5):
        graph.replay()
    for _ in range(8):
        train_once(models[1], plain)
    # torch may choose other kernels for its products within a capture
    torch.testing.assert_close(
        [p.detach() for p in models[0].parameters()],
        [p.detach() for p in models[1].parameters()],
        rtol=1e-4,
        atol=1e-6,
    )
    assert {state["step"].item() for state in graphed.state.values()} == {8.0}


@pytest.mark.parametrize(
    ("options", "steps", "words"),
    [
        (
            {},
            1,
            r"Attempting CUDA graph capture of step\(\) for an instance of AdamW but param_groups' "
            "capturable is False",
        ),
        ({"fused": True}, 1, "param_groups' capturable is False"),
        ({}, 0, "param_groups' capturable is False"),
        ({"capturable": True}, 0, "one more step like this before the capture"),
    ],
    ids=str,
)
def test_captures_that_are_refused(options: dict[str, bool], steps: int, words: str) -> None:
    params, others = drawn(), drawn()
    optimizer, plain = (stepwell.AdamW(p, **options) for p in (params, others))
    warm(optimizer, steps)
    warm(plain, steps)
    give(params, 1)
    before = on_host(optimizer)
    graph, scratch = torch.cuda.CUDAGraph(), torch.zeros(1, device=DEVICE)
    with torch.cuda.graph(graph):
        # torch warns of an empty graph
        scratch.add_(1)
        with pytest.raises(RuntimeError, match=words):
            optimizer.step()
    assert_equal(optimizer, before, "refused")
    give(others, 1)
    for each in (optimizer, plain):
        each.step()
    assert_equal(optimizer, plain, "a step after the refusal")


# Streams


def test_streams_take_turns() -> None:
    for flags in FLAGS.values():
        params, others = drawn(), drawn()
        turning, steady = (Clipped(p, max_norm=0.5, **flags) for p in (params, others))
        before = torch.cuda.current_stream()
        streams = [torch.cuda.Stream(), torch.cuda.Stream(), before]
        # copies from the host would wait
        ready = [gradients(params, step) for step in range(7)]
        for step, grads in enumerate(ready):
            stream = streams[step % 3]
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                # so late that work on a stream that does not wait would come first
                torch.cuda._sleep(10_000_000)
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                turning.param_groups[0]["lr"] = 0.01 / (step + 1)
                turning.step()
            before = stream
        streams[2].wait_stream(before)
        for step in range(7):
            give(others, step)
            steady.param_groups[0]["lr"] = 0.01 / (step + 1)
            steady.step()
        assert_equal(turning, steady, "three streams")


@pytest.mark.parametrize("flags", **named(tuple(FLAGS)))
def test_the_host_may_run_ahead(flags: str) -> None:
    """Tables of steps that are still to be done stay as they were meant."""
    params, others = drawn(), moved(parameters(SMALL, torch.float32), "cpu")
    late = stepwell.AdamW(params, **FLAGS[flags])
    prompt = stepwell.AdamW(others, foreach=False)
    steps = range(50)
    # copies from the host would wait
    ready = [gradients(params, step) for step in steps]

    def step_with(optimizer: Any, grads: Sequence[Tensor], step: int) -> None:
        group = optimizer.param_groups[0]
        group["lr"] = 0.02 / (1 + step)
        for param, grad in zip(group["params"], grads, strict=True):
            param.grad = grad
        optimizer.step()

    step_with(late, ready[0], 0)
    torch.cuda.synchronize()
    began = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    began.record()
    for step in steps[1:]:
        step_with(late, ready[step], step)
    assert not began.query(), "the device did not sleep long enough for this test to mean anything"
    for step in steps:
        step_with(prompt, gradients(others, step), step)
    # a rounding or so per step
    assert_near(late, prompt, TWIN_LIMIT, "fifty steps ahead")


# Several devices, and several kinds of parameters


def test_parameters_on_several_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for make in (stepwell.AdamW, lambda p: Clipped(p, max_norm=0.5, fused=True)):
        values = parameters(SMALL * 2, torch.float32)
        apart = [*moved(values[:4], "cuda:0"), *moved(values[4:], "cuda:1")]
        found = trained(make, apart, 4)
        assert backends(found) == {"triton"}
        assert_equal(found, trained(make, moved(values), 4), "two devices")


@pytest.mark.parametrize("flags", **named(tuple(FLAGS)))
def test_parameters_of_several_dtypes_are_as_if_alone(flags: str) -> None:
    params, others = ([p for dtype in FLOATS for p in drawn(dtype=dtype)] for _ in range(2))
    together = stepwell.AdamW(params, **FLAGS[flags])
    count = len(SMALL)
    alone = [
        stepwell.AdamW(others[i : i + count], **FLAGS[flags]) for i in range(0, len(others), count)
    ]
    for step in range(3):
        for mine in (params, others):
            give(mine, step)
        for optimizer in (together, *alone):
            optimizer.step()
    assert len(together._held[0].describe()) == len(FLOATS)
    for i, (param, other) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(param.detach().cpu(), other.detach().cpu(), f"parameter {i}")


@pytest.mark.parametrize("flags", **named(tuple(FLAGS)))
def test_parameters_on_host_and_device(flags: str) -> None:
    for rule, limit in ((stepwell.AdamW, 0), (Clipped, 8)):
        values = parameters(SMALL * 2, torch.float32)

        def mixed(devices: Sequence[str]) -> list[Parameter]:
            halves = zip((values[:4], values[4:]), devices, strict=True)  # noqa: B023
            return [p for half, device in halves for p in moved(half, device)]

        found = trained(lambda p: rule(p, **FLAGS[flags]), mixed(("cpu", DEVICE)), 3)  # noqa: B023
        assert backends(found) == {"cpu", "triton"}
        host = trained(lambda p: rule(p, **FLAGS[flags]), mixed(("cpu", "cpu")), 3)  # noqa: B023
        device = trained(lambda p: rule(p, **FLAGS[flags]), mixed((DEVICE, DEVICE)), 3)  # noqa: B023
        found, host, device = on_host(found), on_host(host), on_host(device)
        expected = {e: host[e] if e.index < 4 else device[e] for e in found}
        # alone they are the same to the bit; a norm of both is added up by either
        assert_near(found, expected, limit, f"{rule.__name__} on both")


# Memory


@pytest.mark.parametrize("name", QUIET)
def test_gradients_move_come_and_go(name: str) -> None:
    params, others = drawn(), drawn()
    moving, steady = QUIET[name](params), QUIET[name](others)
    litter = []
    for step in range(6):
        moving.zero_grad()
        # blocks that gradients were in are taken
        litter.append([torch.full_like(p, torch.nan) for p in params])
        give(params, step)
        for other, grad in zip(others, gradients(others, step), strict=True):
            if other.grad is None:
                other.grad = grad
            else:
                other.grad.copy_(grad)
        if step in (2, 4):
            params[step // 2].grad = others[step // 2].grad = None
        moving.step()
        steady.step()
    assert backends(moving) == {"triton"}
    assert_equal(moving, steady, name)


@pytest.mark.parametrize("flags", **named(tuple(FLAGS)))
def test_parameters_and_state_move(flags: str) -> None:
    params, others = drawn(), drawn()
    moving, steady = (stepwell.AdamW(p, **FLAGS[flags]) for p in (params, others))
    litter = []
    for step in range(5):
        if step in (2, 3):
            for param in params:
                old = [param.data, moving.state[param]["exp_avg"]]
                param.data, moving.state[param]["exp_avg"] = (t.clone() for t in old)
                litter += [tensor.fill_(torch.nan) for tensor in old]
        for optimizer, mine in ((moving, params), (steady, others)):
            give(mine, step)
            optimizer.step()
    assert_equal(moving, steady, "new memory for parameters and moments")


@pytest.mark.parametrize(("case", "flags"), STATES)
def test_a_file_goes_on(case: Case, flags: dict[str, bool], tmp_path: Path) -> None:
    """To the bits of the training that was never saved, on the GPU on which that runs."""
    path = tmp_path / "run.safetensors"
    first, second = (torch.nn.ParameterList(drawn()) for _ in range(2))
    before = trained(lambda p: case.make(p, **flags), [*first], 2)
    after = case.make([*second], **flags)
    save(path, model=first, optimizer=before)
    for param in second:
        param.data.zero_()
    load(path, model=second, optimizer=after)
    assert_equal(after, before, f"{case.name}, as loaded")
    assert kinds(after) == kinds(before)
    for params, optimizer in ((first, before), (second, after)):
        for step in range(2, 4):
            give([*params], step)
            optimizer.step()
    assert_equal(after, before, case.name)


@pytest.mark.parametrize("name", GRAPHED)
def test_a_checkpoint_is_taken_up(name: str) -> None:
    params = drawn()
    optimizer = trained(GRAPHED[name], params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    values = [param.detach().clone() for param in params]
    results = []
    for _ in range(2):
        for step in range(2, 4):
            give(params, step)
            optimizer.step()
        results.append(on_host(optimizer))
        optimizer.load_state_dict(saved)
        with torch.no_grad():
            torch._foreach_copy_(params, values)
    assert_equal(results[0], results[1], f"{name}, from the same checkpoint twice")


@pytest.mark.parametrize("flags", **named(tuple(FLAGS)))
def test_a_step_takes_no_memory(flags: str) -> None:
    params = drawn(((4_000_000,), (1000, 1000)))
    optimizer = trained(lambda p: Clipped(p, **FLAGS[flags]), params, 3)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(10):
        optimizer.step()
    # 20 MB of parameters; totals take a few hundred bytes
    assert torch.cuda.max_memory_allocated() - before < 100_000
    assert torch.cuda.memory_allocated() == before


def test_an_optimizer_leaves_no_memory_behind() -> None:
    def use() -> None:
        optimizer = GRAPHED["AdamW clipped"](drawn())
        warm(optimizer, 2)
        graph = captured(optimizer)
        graph.replay()
        torch.cuda.synchronize()

    sizes = []
    for _ in range(3):
        use()
        gc.collect()
        sizes.append(torch.cuda.memory_allocated())
    # what the first one left behind may be torch's own, to be used again
    assert sizes[1] == sizes[2]


@pytest.mark.parametrize("flags", **named(tuple(FLAGS)))
def test_a_copy_goes_on_by_itself(flags: str) -> None:
    steady = trained(lambda p: Clipped(p, **FLAGS[flags]), drawn(), 2)
    before = copy.deepcopy(steady)
    after = trained(lambda p: before, before.param_groups[0]["params"], 2, first=2)
    for step in range(2, 4):
        give(steady.param_groups[0]["params"], step)
        steady.step()
    assert_equal(after, steady, "a copy")


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sparse_gradients(momentum: float) -> None:
    results = []
    for device in ("cpu", DEVICE):
        (weight,) = moved(parameters(((50, 8),), torch.float32), device)
        optimizer = stepwell.SGD([weight], lr=0.1, momentum=momentum)
        for step in range(3):
            optimizer.zero_grad()
            rows = torch.tensor([3, 7, 3, 10 + step], device=device)
            torch.nn.functional.embedding(rows, weight, sparse=True).square().sum().backward()
            assert weight.grad.is_sparse
            optimizer.step()
        results.append(on_host(optimizer))
    # rows that occur twice are added up
    assert_near(results[1], results[0], LIMITS[torch.float32], f"momentum {momentum}")


def test_more_elements_than_32_bits_count() -> None:
    count = 2**31 + 8
    if torch.cuda.mem_get_info()[0] < 13 * 2**30:
        pytest.skip("needs 13 GB of free memory on the GPU")
    param = Parameter(torch.ones(count, dtype=torch.bfloat16, device=DEVICE))
    param.grad = torch.full_like(param, 0.5)
    ends = torch.tensor([0, 1, 2**30, 2**31 - 1, 2**31, count - 1], device=DEVICE)
    param.grad[ends] = torch.arange(6, dtype=torch.bfloat16, device=DEVICE)
    optimizer = stepwell.SGD([param], lr=0.25)
    optimizer.step()
    assert backends(optimizer) == {"triton"}
    assert param[ends].tolist() == [1 - 0.25 * i for i in range(6)]
    for start in (3, 2**30 + 1, 2**31 - 17, 2**31 + 1):
        assert set(param[start : min(start + 16, count - 1)].tolist()) == {0.875}
    del param, optimizer
    torch.cuda.empty_cache()


# Compilation


class Compiled(stepwell.Optimizer):
    """A rule that no other test has had compiled."""

    lr: NonNegative = 1e-3
    decay: Decay = 0.9

    exp_avg = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        state.exp_avg = lerp(state.exp_avg, grad, 1 - group.decay)
        return param - group.lr / (1 - group.decay**state.step) * state.exp_avg


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that Triton compiles, or reads from its cache on disk."""
    import triton

    found: list[str] = []
    if not hasattr(triton.knobs.runtime, "jit_post_compile_hook"):
        pytest.skip("this Triton does not tell what it compiles")
    monkeypatch.setattr(
        triton.knobs.runtime,
        "jit_post_compile_hook",
        lambda **facts: found.append(facts["fn"].name),
    )
    return found


def test_nothing_is_compiled_again(compilations: list[str]) -> None:
    trained(Compiled, drawn(), 1)
    assert sorted(compilations) == ["sweep_0"]
    trained(lambda p: Compiled(p, fused=True), drawn(), 1)
    first = ["rows_0", "sweep_0", "sweep_0"]
    assert sorted(compilations) == first
    for make in (
        Compiled,
        lambda p: Compiled(p, fused=True),
        lambda p: Compiled(p, lr=1.0, decay=0.5, capturable=True),
        lambda p: Compiled(p, lr=rate()),
        lambda p: Compiled(split(p, (1,) * len(p)), lr=0.0),
    ):
        for shapes in (((1,),), ((16,),) * 3, ((100_000,),), ((5, 3),) * 130, SIZES):
            optimizer = trained(make, drawn(shapes), 2)
            if not torch.is_tensor(optimizer.param_groups[0]["lr"]):
                optimizer.param_groups[0]["lr"] = 0.125
            give([p for g in optimizer.param_groups for p in g["params"]], 2)
            optimizer.step()
        trained(make, layouts(torch.float32), 2)
    assert sorted(compilations) == first


@pytest.mark.parametrize("case", **named(per_element(PLAIN)))
def test_without_triton(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "stepwell.backends.triton.unusable", lambda device: "Triton is not installed"
    )
    params = drawn()
    optimizer = case.make(params)
    with caplog.at_level(logging.DEBUG, logger="stepwell"):
        give(params, 0)
        optimizer.step()
    said = [line for line in caplog.messages if "Triton is not installed" in line]
    assert said == [f"{case.rule.__name__}: not on back-end triton: Triton is not installed"]
    for step in range(1, 4):
        give(params, step)
        optimizer.step()
    assert backends(optimizer) == {"foreach"}
    monkeypatch.undo()
    assert_near(optimizer, trained(case.make, drawn(), 4), LIMITS[torch.float32], case.name)


@pytest.mark.slow
# the compiler itself warns of what it does, but must not look into the optimizer
@pytest.mark.filterwarnings("ignore", "error:.*does not know how to trace")
def test_a_compiled_model() -> None:
    inputs = numbers((32, 16), torch.float32, 5).to(DEVICE)
    results = []
    for compiles in (False, True):
        model = network()
        optimizer = Clipped(model.parameters(), lr=0.01, eps=1e-3, max_norm=0.5)

        def train_once(model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (model(inputs) - 1).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = torch.compile(train_once) if compiles else train_once
        losses = [float(run()) for _ in range(10)]
        assert backends(optimizer) == {"triton"}
        results.append((losses, [p.detach() for p in model.parameters()]))
    # ten steps of a network whose kernels round elsewhere
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)
