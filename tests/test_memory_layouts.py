"""Is a step right wherever the numbers lie, and whatever is done to them between steps?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.native.triton_jit import is_interpreting

from .cases import NATIVE, PLAIN, REQUESTS, Case, named, numbers, parameters, per_element, set_grads
from .compare import (
    assert_same_bits,
    assert_same_training,
    assert_training_within,
    backends,
    everything,
    snapshot,
)

# with TRITON_INTERPRET=1 these go through the kernels for GPUs
pytestmark = pytest.mark.interpret

ULPS = 8
"""A back-end may use multiply-add where eager does not: see test_backends.py."""

Build = Callable[[], Tensor]


def _channels_last() -> Tensor:
    return numbers((2, 3, 4, 5), torch.float32, 1).to(memory_format=torch.channels_last)


# name: (how the parameter lies in memory, the back-end that takes it)
LAYOUTS: dict[str, tuple[Build, str]] = {
    "contiguous": (lambda: numbers((4, 6), torch.float32, 1), NATIVE),
    "transposed": (lambda: numbers((4, 6), torch.float32, 1).T, NATIVE),
    "permuted": (lambda: numbers((2, 3, 4), torch.float32, 1).permute(2, 0, 1), NATIVE),
    "channels last": (_channels_last, NATIVE),
    "a slice of a buffer": (lambda: numbers((10, 6), torch.float32, 1)[3:7], NATIVE),
    "an odd address": (lambda: numbers((25,), torch.float32, 1)[1:], NATIVE),
    "every second column": (lambda: numbers((4, 6), torch.float32, 1)[:, ::2], "foreach"),
    "a column": (lambda: numbers((4, 6), torch.float32, 1)[:, 2], "foreach"),
    "size-1 dimensions": (lambda: numbers((4, 6), torch.float32, 1)[:1].unsqueeze(1), NATIVE),
    "one element of many": (lambda: numbers((4, 6), torch.float32, 1)[2:3, 3:4], NATIVE),
    "transposed complex": (lambda: numbers((4, 6), torch.complex64, 1).T, NATIVE),
}
# how a gradient may lie, given the parameter it is for
GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as the parameter": lambda grad, param: torch.empty_like(param).copy_(grad),
    "contiguous": lambda grad, param: grad.contiguous(),
    "turned": lambda grad, param: grad.mT.contiguous().mT if grad.dim() > 1 else grad,
    "with gaps": lambda grad, param: torch.stack([grad, grad], -1)[..., 0],
}


def _step(
    make: Callable[[Any], Any], tensor: Tensor, shape_grad: Callable[[Tensor, Tensor], Tensor]
) -> Any:
    """Three steps on one parameter that lies as `tensor` does, with gradients laid out so."""
    param = nn.Parameter(tensor)
    assert param.stride() == tensor.stride()
    optimizer = make([param])
    for step in range(3):
        drawn = numbers(param.shape, param.dtype, 50 + step)
        param.grad = shape_grad(drawn, param)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("grad_layout", GRADS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **named(per_element(PLAIN)))
def test_layouts(case: Case, layout: str, grad_layout: str) -> None:
    build, backend = LAYOUTS[layout]
    plain = _step(lambda p: case.make(p, foreach=False), build().contiguous(), GRADS["contiguous"])
    for request in ({}, {"foreach": True}, {"foreach": False}):
        made = _step(lambda p: case.make(p, **request), build(), GRADS[grad_layout])  # noqa: B023
        assert_training_within(made, plain, ULPS, f"{layout}, gradient {grad_layout}, {request}")
        if not request:
            assert backends(made) == {backend}


@pytest.mark.parametrize("request_", REQUESTS)
def test_what_lies_between_the_elements_stays(request_: str) -> None:
    buffer = numbers((4, 6), torch.float32, 1)
    before = buffer.clone()
    param = nn.Parameter(buffer[:, ::2])
    optimizer = stepwell.AdamW([param], lr=0.1, **REQUESTS[request_])
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert_same_bits(buffer[:, 1::2], before[:, 1::2], "columns that are no parameter")
    assert bool((buffer[:, ::2] != before[:, ::2]).all())


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("case", **named(PLAIN))
def test_an_expanded_gradient(case: Case, request_: str) -> None:
    # what x.sum().backward() leaves: one number seen as many
    expanded, plain = (parameters(((4, 6), (5,)), torch.float32) for _ in range(2))
    one = case.make(expanded, **REQUESTS[request_])
    other = case.make(plain, **REQUESTS[request_])
    for value in (0.5, -1.5):
        for param in expanded:
            param.grad = torch.tensor(value).expand(param.shape)
        for param in plain:
            param.grad = torch.full_like(param, value)
        one.step()
        other.step()
    # torch's own kernels may or may not use multiply-add, by the layout
    assert_training_within(one, other, 2, f"{case.name} with expanded gradients")


@pytest.mark.parametrize("request_", REQUESTS)
def test_gradients_that_share_memory(request_: str) -> None:
    shared = numbers((4, 6), torch.float32, 3)
    params, plain = (parameters(((4, 6), (4, 6)), torch.float32) for _ in range(2))
    one = stepwell.AdamW(params, **REQUESTS[request_])
    other = stepwell.AdamW(plain, **REQUESTS[request_])
    for _ in range(2):
        for param, copied in zip(params, plain, strict=True):
            param.grad, copied.grad = shared, shared.clone()
        one.step()
        other.step()
    assert_same_training(one, other, "two parameters with one gradient")
    assert_same_bits(shared, numbers((4, 6), torch.float32, 3), "the gradient")


# Memory that is shared


def test_a_parameter_that_overlaps_itself_is_refused_as_torch_does() -> None:
    for package in (torch.optim, stepwell):
        param = nn.Parameter(torch.ones(1).expand(4))
        optimizer = package.SGD([param], lr=0.1)
        param.grad = torch.ones(4)
        with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
            optimizer.step()
        assert param.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("case", **named(PLAIN))
def test_parameters_that_overlap_are_updated_one_after_the_other(case: Case) -> None:
    """The second sees what the first has written, in any order of memory, as with torch's loop."""

    def overlapping() -> list[nn.Parameter]:
        buffer = numbers((12,), torch.float32, 1)
        cuts = (buffer[4:10], buffer[0:6], buffer[8:12], numbers((3,), torch.float32, 2))
        return [nn.Parameter(cut) for cut in cuts]

    params, twin_params = overlapping(), overlapping()
    ours, theirs = case.make(params), case.make_twin(twin_params, foreach=False)
    for step in range(3):
        set_grads(params, step)
        set_grads(twin_params, step)
        ours.step()
        theirs.step()
    # the last one lies alone and need not wait
    assert backends(ours) == {"eager", NATIVE}
    assert_training_within(ours, theirs, ULPS, f"{case.name} on overlapping parameters")


Cuts = Callable[[Tensor], list[Tensor]]
# parameters cut from one stretch of 24 numbers, and whether they share some of them
INTERLEAVED: dict[str, tuple[Cuts, bool]] = {
    "with gaps, one number in common": (lambda b: [b[0:8:4], b[4:8:2]], True),
    "with gaps, in each other's": (lambda b: [b[0::2], b[1::2]], False),
    "the columns of a matrix": (lambda b: list(b.view(4, 6).unbind(1)), False),
    "columns, and a row": (lambda b: [*b.view(4, 6).unbind(1), b[6:12]], True),
    "a stretch in the gap of another": (lambda b: [b[0:24:12], b[3:9]], False),
    "a stretch across the gap of another": (lambda b: [b[0:24:12], b[3:13]], True),
    "the same numbers, turned": (lambda b: [b.view(4, 6), b.view(4, 6).T], True),
    "parts of complex numbers": (
        lambda b: [torch.view_as_complex(b.view(12, 2))[0::2].real, b[1::4]],
        False,
    ),
}


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("kind", INTERLEAVED)
def test_parameters_in_the_gaps_of_each_other(kind: str, request_: str) -> None:
    """Only numbers that are shared are a reason to go slowly."""
    cut, shares = INTERLEAVED[kind]
    made = []
    for _ in range(2):
        params = [nn.Parameter(part) for part in cut(numbers((24,), torch.float32, 1))]
        made.append(params)
    ours = stepwell.Adam(made[0], lr=0.1, **REQUESTS[request_])
    theirs = torch.optim.Adam(made[1], lr=0.1, foreach=False)
    for step in range(3):
        for params in made:
            set_grads(params, step)
        ours.step()
        theirs.step()
    if shares:
        assert backends(ours) <= {"eager", NATIVE}
        assert "eager" in backends(ours)
    elif request_ != "eager":
        assert "eager" not in backends(ours)
    assert_training_within(ours, theirs, ULPS, kind)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("part", [slice(0, 6), slice(3, 9)])
def test_a_gradient_in_the_memory_of_parameters(part: slice, request_: str) -> None:
    """It changes while they are updated, one after the other, as with torch's loop."""
    made = []
    for _ in range(2):
        buffer = numbers((12,), torch.float32, 1)
        params = [nn.Parameter(buffer[:6]), nn.Parameter(buffer[6:])]
        params[0].grad, params[1].grad = numbers((6,), torch.float32, 2), buffer[part]
        made.append(params)
    ours = stepwell.Adam(made[0], lr=0.1, **REQUESTS[request_])
    theirs = torch.optim.Adam(made[1], lr=0.1, foreach=False)
    for _ in range(3):
        ours.step()
        theirs.step()
    assert backends(ours) == {"eager"}
    assert_training_within(ours, theirs, ULPS, "a gradient that is part of parameters")


@pytest.mark.parametrize("request_", REQUESTS)
def test_parameters_that_begin_to_overlap_are_noticed(request_: str) -> None:
    params, twins = (parameters(((6,), (6,)), torch.float32) for _ in range(2))
    ours = stepwell.SGD(params, lr=0.1, **REQUESTS[request_])
    theirs = torch.optim.SGD(twins, lr=0.1, foreach=False)
    for step in range(4):
        if step == 2:
            for a, b in (params, twins):
                a.data = b.data = numbers((6,), torch.float32, 9)
        set_grads(params, step)
        set_grads(twins, step)
        ours.step()
        theirs.step()
        assert backends(ours) == {request_ if step < 2 else "eager"}
    assert_training_within(ours, theirs, ULPS, "parameters that came to share memory")


@pytest.mark.parametrize("request_", ["eager", NATIVE])
@pytest.mark.parametrize("case", **named(PLAIN))
def test_a_gradient_that_is_its_parameter(case: Case, request_: str) -> None:
    """The rule sees the gradient as it was before the step; foreach, as torch, works in place."""
    params, plain = (parameters(((6,), (40, 40)), torch.float32) for _ in range(2))
    one, other = (case.make(p, **REQUESTS[request_]) for p in (params, plain))
    for _ in range(2):
        for param, copied in zip(params, plain, strict=True):
            param.grad, copied.grad = param.data, copied.data.clone()
        one.step()
        other.step()
    assert_same_training(one, other, f"{case.name} with p.grad = p.data")


def test_tied_parameters() -> None:
    tied = nn.Parameter(numbers((5, 5), torch.float32, 1))
    with pytest.warns(UserWarning, match="optimizer contains a parameter group with duplicate"):
        ours = stepwell.SGD([tied, tied], lr=0.1)
    twin = nn.Parameter(tied.detach().clone())
    with pytest.warns(UserWarning, match="optimizer contains a parameter group with duplicate"):
        theirs = torch.optim.SGD([twin, twin], lr=0.1)
    for param in (tied, twin):
        param.grad = torch.ones_like(param)
    ours.step()
    theirs.step()
    assert_same_bits(tied, twin, "a parameter listed twice")
    # and as it should be done: the model lists a tied weight once
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    optimizer = stepwell.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 5)).sum().backward()
    assert len(optimizer.param_groups[0]["params"]) == 3
    optimizer.step()


# Lazily conjugated and negated gradients


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("case", **named(per_element(PLAIN)))
def test_a_lazily_conjugated_gradient(case: Case, request_: str) -> None:
    if request_ == NATIVE:
        options: dict[str, Any] = {}
    else:
        options = REQUESTS[request_]
    lazy, plain = (parameters(((4, 6), (7,)), torch.complex64) for _ in range(2))
    one, other = case.make(lazy, **options), case.make(plain, **options)
    for step in range(3):
        for i, (param, copied) in enumerate(zip(lazy, plain, strict=True)):
            grad = numbers(param.shape, torch.complex64, 10 * step + i)
            # the first step looks plain, so that a later one has to be noticed
            param.grad = grad if step == 0 else grad.conj()
            copied.grad = grad if step == 0 else grad.conj_physical()
            assert param.grad.is_conj() is (step > 0)
        one.step()
        other.step()
        assert backends(one) == {request_}
    assert_same_training(one, other, f"{case.name} with conj() gradients")


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("case", **named(per_element(PLAIN)))
def test_a_lazily_negated_gradient(case: Case, request_: str) -> None:
    lazy, plain = (parameters(((4, 6), (7,)), torch.float32) for _ in range(2))
    one, other = (case.make(p, **REQUESTS[request_]) for p in (lazy, plain))
    for step in range(3):
        for i, (param, copied) in enumerate(zip(lazy, plain, strict=True)):
            grad = numbers(param.shape, torch.float32, 10 * step + i)
            param.grad = grad.clone() if step == 0 else torch._neg_view(grad)
            copied.grad = grad.clone() if step == 0 else -grad
        one.step()
        other.step()
        assert backends(one) == {request_}
    assert_same_training(one, other, f"{case.name} with negated views")


LAZY: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor]]] = {
    "conjugated": (torch.complex64, Tensor.conj),
    "negated": (torch.float32, torch._neg_view),
    "turned": (torch.float32, lambda t: t.mT.contiguous().mT),
    "with gaps": (torch.float32, lambda t: torch.stack([t, t], -1)[..., 0]),
    "expanded": (torch.float32, lambda t: t[:1].expand(t.shape)),
}


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("lazy", LAZY)
def test_unscaling_writes_any_gradient(lazy: str, request_: str) -> None:
    """A loss scaler's factor is taken out of the gradient itself, wherever that lies."""
    dtype, lay_out = LAZY[lazy]
    param, plain = (nn.Parameter(numbers((4, 6), dtype, 1)) for _ in range(2))
    one, other = (stepwell.SGD([p], lr=0.1, **REQUESTS[request_]) for p in (param, plain))
    for step in range(2):
        grad = numbers((4, 6), dtype, 10 + step)
        param.grad, plain.grad = lay_out(grad * 8), lay_out(grad).clone()
        expected = plain.grad.clone()
        one.grad_scale, one.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        one.step()
        other.step()
        assert_same_bits(param.grad.resolve_conj().resolve_neg(), expected, "the gradient")
    assert_same_training(one, other, f"{lazy} gradients, unscaled")


def test_a_negated_gradient_of_a_complex_parameter() -> None:
    lazy, plain = (parameters(((4, 6),), torch.complex64) for _ in range(2))
    one, other = stepwell.Adam(lazy), stepwell.Adam(plain)
    for step in range(2):
        grad = numbers((4, 6), torch.complex64, step)
        lazy[0].grad, plain[0].grad = torch._neg_view(grad), -grad
        one.step()
        other.step()
    assert_same_training(one, other, "a negated view of complex numbers")


# What a user does to parameters between steps


@pytest.fixture(params=list(REQUESTS))
def pair(request: Any) -> Iterator[tuple[Any, Any]]:
    """Ours on each back-end and torch's, after two steps on parameters of the same values."""
    # fused=True could refuse what the plain default takes, so ask for nothing
    options = {} if request.param == NATIVE else REQUESTS[request.param]
    params, twins = (parameters(((4, 6), (7,), (2, 3, 4)), torch.float32) for _ in range(2))
    ours = stepwell.AdamW(params, lr=0.05, amsgrad=True, **options)
    theirs = torch.optim.AdamW(twins, lr=0.05, amsgrad=True)
    yield from _checked(ours, theirs, 2)


def _checked(ours: Any, theirs: Any, steps: int) -> Iterator[tuple[Any, Any]]:
    _steps(ours, theirs, range(steps))
    yield ours, theirs
    # the step after the interference, and one more: the first may take another way
    for step in range(steps, steps + 2):
        _steps(ours, theirs, range(step, step + 1))
        assert_training_within(ours, theirs, 32, f"step {step}")


def _params(optimizer: Any) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _steps(ours: Any, theirs: Any, steps: range) -> None:
    for optimizer in (ours, theirs):
        for step in steps:
            params = [param for param in _params(optimizer) if param.requires_grad]
            set_grads(params, step)
            optimizer.step()


def _interfere(pair: tuple[Any, Any], change: Callable[[Any], None]) -> None:
    for optimizer in pair:
        change(optimizer)


def test_data_is_replaced(pair: tuple[Any, Any]) -> None:
    def change(optimizer: Any) -> None:
        for i, param in enumerate(_params(optimizer)):
            param.data = numbers(param.shape, torch.float32, 77 + i)

    _interfere(pair, change)


def test_data_is_replaced_by_another_layout(pair: tuple[Any, Any]) -> None:
    def change(optimizer: Any) -> None:
        first = _params(optimizer)[0]
        first.data = first.data.T.contiguous().T

    _interfere(pair, change)


def test_values_are_written_in_place(pair: tuple[Any, Any]) -> None:
    def change(optimizer: Any) -> None:
        with torch.no_grad():
            for param in _params(optimizer):
                param.mul_(0.5)
                optimizer.state[param]["exp_avg"].mul_(0.5)

    _interfere(pair, change)


def test_a_state_tensor_is_replaced(pair: tuple[Any, Any]) -> None:
    def change(optimizer: Any) -> None:
        for i, param in enumerate(_params(optimizer)):
            optimizer.state[param]["exp_avg"] = numbers(param.shape, torch.float32, 77 + i)

    _interfere(pair, change)


def test_the_step_count_is_replaced(pair: tuple[Any, Any]) -> None:
    def change(optimizer: Any) -> None:
        for param in _params(optimizer):
            optimizer.state[param]["step"] = torch.tensor(100.0)

    _interfere(pair, change)


def test_the_state_is_cleared(pair: tuple[Any, Any]) -> None:
    _interfere(pair, lambda optimizer: optimizer.state.clear())


def test_the_state_of_one_parameter_is_deleted(pair: tuple[Any, Any]) -> None:
    def change(optimizer: Any) -> None:
        del optimizer.state[_params(optimizer)[1]]

    _interfere(pair, change)


def test_the_state_of_one_parameter_is_emptied_in_place(pair: tuple[Any, Any]) -> None:
    _interfere(pair, lambda optimizer: optimizer.state[_params(optimizer)[1]].clear())


def test_a_parameter_changes_its_shape(pair: tuple[Any, Any]) -> None:
    def change(optimizer: Any) -> None:
        first = _params(optimizer)[0]
        first.data = torch.cat([first.data, torch.ones(2, 6)])
        state = optimizer.state[first]
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            state[name] = torch.cat([state[name], torch.zeros(2, 6)])

    _interfere(pair, change)


def test_rates_change(pair: tuple[Any, Any]) -> None:
    def change(optimizer: Any) -> None:
        optimizer.param_groups[0].update(lr=0.001, betas=(0.5, 0.6), weight_decay=0.3)

    _interfere(pair, change)


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_rate_in_a_tensor_changes_in_place(request_: str) -> None:
    params, twins = (parameters(((4, 6), (7,)), torch.float32) for _ in range(2))
    options = {} if request_ == NATIVE else REQUESTS[request_]
    rates = [torch.tensor(0.1), torch.tensor(0.1)]
    ours = stepwell.SGD(params, lr=rates[0], momentum=0.9, **options)
    theirs = torch.optim.SGD(twins, lr=rates[1], momentum=0.9)
    for step in range(4):
        for rate in rates:
            rate.mul_(0.5)
        _steps(ours, theirs, range(step, step + 1))
        assert_training_within(ours, theirs, ULPS, f"step {step}")


def test_weight_decay_is_switched_off(pair: tuple[Any, Any]) -> None:
    _interfere(pair, lambda optimizer: optimizer.param_groups[0].update(weight_decay=0))


def test_maximize_is_switched_on(pair: tuple[Any, Any]) -> None:
    _interfere(pair, lambda optimizer: optimizer.param_groups[0].update(maximize=True))


def test_a_group_is_added(pair: tuple[Any, Any]) -> None:
    def change(optimizer: Any) -> None:
        more = nn.Parameter(numbers((3, 3), torch.float32, 5))
        optimizer.add_param_group({"params": [more], "lr": 0.5, "amsgrad": False})

    _interfere(pair, change)


def test_a_parameter_is_frozen(pair: tuple[Any, Any]) -> None:
    def change(optimizer: Any) -> None:
        frozen = _params(optimizer)[1]
        frozen.requires_grad_(False)
        frozen.grad = None

    _interfere(pair, change)
    frozen = _params(pair[0])[1]
    before = frozen.detach().clone()
    _steps(*pair, range(2, 4))
    assert_same_bits(frozen, before, "a frozen parameter")
    _interfere(pair, lambda optimizer: _params(optimizer)[1].requires_grad_(True))


def test_parameters_are_listed_in_place(pair: tuple[Any, Any]) -> None:
    """A parameter is taken out of its group, and another put in, behind the optimizer's back."""

    def change(optimizer: Any) -> None:
        params = optimizer.param_groups[0]["params"]
        params.pop(1)
        params.append(nn.Parameter(numbers((3, 3), torch.float32, 5)))

    _interfere(pair, change)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("case", **named(per_element(PLAIN)))
def test_a_model_is_retyped(case: Case, request_: str) -> None:
    """As .double() does: new numbers in the same parameters; the state keeps its precision."""
    params = parameters(((4, 6), (7,)), torch.float32)
    optimizer = case.make(params, **REQUESTS[request_])
    for step in range(4):
        if step == 2:
            for param in params:
                param.data, param.grad = param.data.double(), None
        set_grads(params, step)
        optimizer.step()
    assert backends(optimizer) == {request_}
    assert all(param.dtype is torch.float64 for param in params)
    kept = [v for s in optimizer.state.values() for n, v in s.items() if n != "step"]
    assert all(value.dtype is torch.float32 for value in kept)
    # the same with everything in float64: what differs is the rounding of the state
    exact = parameters(((4, 6), (7,)), torch.float64)
    wide = case.make(exact, foreach=False)
    for step in range(4):
        set_grads(exact, step)
        wide.step()
    for param, other in zip(params, exact, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_model_becomes_half_precision(request_: str) -> None:
    params = parameters(((4, 6), (7,)), torch.float32)
    optimizer = stepwell.AdamW(params, **REQUESTS[request_])
    set_grads(params, 0)
    optimizer.step()
    for param in params:
        param.data, param.grad = param.data.bfloat16(), None
    set_grads(params, 1)
    optimizer.step()
    assert backends(optimizer) == {request_}
    assert all(state["exp_avg"].dtype is torch.float32 for state in optimizer.state.values())


def test_state_of_the_wrong_shape_is_refused_before_anything_changes() -> None:
    params = parameters(((4, 6), (7,)), torch.float32)
    optimizer = stepwell.AdamW(params)
    set_grads(params, 0)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(8)
    before = snapshot(optimizer)
    set_grads(params, 1)
    with pytest.raises(ValueError, match=r"state\['exp_avg'\] of group 0, parameter 1 has shape"):
        optimizer.step()
    assert_same_training(optimizer, before, "a refused step")


# Gradients that come and go


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("case", **named(PLAIN))
def test_parameters_without_gradient_are_skipped_whole(case: Case, request_: str) -> None:
    shapes = ((4, 6), (7,), (2, 3))
    params, twins = (parameters(shapes, torch.float32) for _ in range(2))
    ours = case.make(params, **REQUESTS[request_])
    theirs = case.make_twin(twins, foreach=False)
    present = [(0, 2), (0, 1, 2), (), (1,), (0, 1, 2), (2,)]
    for step, indices in enumerate(present):
        for optimizer, some in ((ours, params), (theirs, twins)):
            before = snapshot(optimizer)
            for param in some:
                param.grad = None
            set_grads([some[i] for i in indices], step)
            optimizer.step()
            after = everything(optimizer)
            skipped = [entry for entry in before if entry.index not in indices]
            for entry in skipped:
                assert_same_bits(after[entry], before[entry], f"step {step}: {entry}")
            added = {entry.index for entry in after.keys() - before.keys()}
            assert added <= set(indices)
    assert_training_within(ours, theirs, 32, case.name)


def test_no_gradient_at_all() -> None:
    params = parameters(((4, 6), (7,)), torch.float32)
    optimizer = stepwell.AdamW(params)
    optimizer.step()
    assert not optimizer.state
    assert "none, no parameter has a gradient" in repr(optimizer)


def test_add_param_group_after_training_began() -> None:
    params, twins = (parameters(((4, 6), (7,)), torch.float32) for _ in range(2))
    ours, theirs = stepwell.Adam(params[:1], lr=0.1), torch.optim.Adam(twins[:1], lr=0.1)
    _steps(ours, theirs, range(2))
    ours.add_param_group({"params": params[1], "lr": 0.01})
    theirs.add_param_group({"params": twins[1], "lr": 0.01})
    _steps(ours, theirs, range(2, 5))
    assert [float(ours.state[p]["step"]) for p in params] == [5, 3]
    assert_training_within(ours, theirs, 16, "a second group")


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_gradient_of_another_dtype(request_: str) -> None:
    """Torch lets autograd hooks, and `grad_dtype`, leave one; half precision then is no loss."""
    param, plain = (nn.Parameter(numbers((4, 6), torch.bfloat16, 1)) for _ in range(2))
    param.grad_dtype = None
    one = stepwell.AdamW([param], lr=0.1, **REQUESTS[request_])
    other = stepwell.AdamW([plain], lr=0.1, **REQUESTS[request_])
    for step in range(3):
        grad = numbers((4, 6), torch.bfloat16, step)
        param.grad, plain.grad = grad.float(), grad
        one.step()
        other.step()
        assert backends(one) == {request_}
    assert_same_training(one, other, "a float32 gradient of a bfloat16 parameter")


# Autograd


@pytest.mark.parametrize("request_", REQUESTS)
def test_autograd_notices_that_a_saved_tensor_was_overwritten(request_: str) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = stepwell.SGD([param], lr=0.1, **REQUESTS[request_])
    loss = (param**2).sum()
    loss.backward(retain_graph=True)
    version = param._version
    optimizer.step()
    assert param._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("case", **named(PLAIN))
def test_modes(case: Case, mode: Any, request_: str) -> None:
    results = []
    for inside in (torch.enable_grad, mode):
        params = parameters(((4, 6), (7,)), torch.float32)
        optimizer = case.make(params, **REQUESTS[request_])
        for step in range(2):
            set_grads(params, step)
            with inside():
                optimizer.step()
        assert not any(v.requires_grad for s in optimizer.state.values() for v in s.values())
        # what was made in inference mode could not be written to here
        set_grads(params, 2)
        optimizer.step()
        results.append(optimizer)
    assert_same_training(results[1], results[0], f"a step in {mode.__name__}")


FORK = """
import os
import torch
import stepwell

torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.ones(100_000)) for _ in range(2)]
optimizer = stepwell.AdamW(params, lr=0.5, weight_decay=0.0)
for param in params:
    param.grad = torch.ones_like(param)
optimizer.step()
[launch] = optimizer._held[0]._launches
assert launch._threads == 2, launch._threads
child = os.fork()
if child == 0:
    optimizer.step()
    os._exit(0 if abs(params[0][0].item()) < 1e-6 else 7)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
optimizer.step()
assert launch._threads == 2, launch._threads
print(params[1][-1].item() < 1e-6)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork() and libgomp are Linux's")
@pytest.mark.skipif(is_interpreting(), reason="Triton's interpreter has no threads")
def test_a_step_after_fork_does_not_hang() -> None:
    run = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stdout.strip()) == (0, "True"), run.stderr
