"""Does autograd find, through `differentiable=True`, the gradient that differences find?

With respect to everything that a step reads: parameters, gradients, each entry of the state and
each number among the hyperparameters, over several steps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import stepwell
from stepwell.cohort import state_shape
from stepwell.language import ClipNorm

from .cases import PLAIN, Case, _case, named, numbers
from .rules import RULES

DIFFERENTIABLE = [
    case
    for case in (*PLAIN, *(_case(rule, None) for rule in RULES))
    if "differentiable" in case.rule.declaration.fields
]
STEPS = 3
SHAPE = (2, 2)
# values that matter, where a default would be off, or is at the end of what is allowed
NUMBERS: dict[str, Any] = {
    "weight_decay": 0.1,
    "lr_decay": 0.1,
    "initial_accumulator_value": 0.2,
    "momentum": 0.8,
    "dampening": 0.1,
    "eps": 0.01,
    "t0": 1.5,
    "lambd": 0.1,
    "momentum_decay": 0.04,
    "lr": 0.05,
    "step_sizes": (1e-6, 50.0),
    "eps1": 0.01,
    "d0": 0.1,
}


def _hyperparameters(rule: type[Any]) -> dict[str, Any]:
    """The numbers of a rule as tensors that autograd follows."""

    def tensor(value: float) -> Tensor:
        return torch.tensor(float(value), dtype=torch.float64, requires_grad=True)

    found: dict[str, Any] = {}
    for name, field in rule.declaration.fields.items():
        value = NUMBERS.get(name, field.default)
        if field.kind == "number" and not field.fixed:
            found[name] = tensor(value)
        elif field.kind == "tuple" and not field.fixed:
            found[name] = tuple(map(tensor, value))
    return found


def _spread(values: dict[str, Any]) -> list[Tensor]:
    parts = (v if isinstance(v, tuple) else (v,) for v in values.values())
    return [tensor for part in parts for tensor in part]


def _joined(names: dict[str, Any], tensors: list[Tensor]) -> dict[str, Any]:
    left = iter(tensors)
    return {
        name: tuple(next(left) for _ in value) if isinstance(value, tuple) else next(left)
        for name, value in names.items()
    }


def _draw(seed: int) -> Tensor:
    return numbers(SHAPE, torch.float64, seed).requires_grad_()


def _trained(case: Case, tensors: list[Tensor], hyper: dict[str, Any], state: list[str]) -> Any:
    """The parameter and its state after some steps."""
    param, grads, rest = tensors[0].clone(), tensors[1 : 1 + STEPS], tensors[1 + STEPS :]
    given = {name: value.clone() for name, value in zip(state, rest, strict=False)}
    options = {**case.options, **_joined(hyper, rest[len(state) :])}
    optimizer = case.rule([param], **options, differentiable=True)
    if given:
        optimizer.state[param].update(given, step=torch.tensor(4.0, dtype=torch.float64))
    for grad in grads:
        param.grad = grad
        optimizer.step()
    after = optimizer.state[param]
    return param, *(value for name, value in sorted(after.items()) if name != "step")


def _start(case: Case) -> dict[str, Tensor]:
    """State in the middle of a training."""
    slots = case.make([torch.zeros(SHAPE)], differentiable=True)
    names = slots._state_formula().slots_in(slots.param_groups[0])
    start = {}
    for number, (name, slot) in enumerate(names.items()):
        if name == "step":
            continue
        shape = state_shape(slot, torch.empty(SHAPE))
        value = numbers(shape, torch.float64, 60 + number).abs() + 0.5
        start[name] = value.requires_grad_()
    return start


@pytest.mark.parametrize("resumed", [False, True], ids=["from the start", "resumed"])
@pytest.mark.parametrize("case", **named(DIFFERENTIABLE))
def test_gradients_are_those_of_differences(case: Case, resumed: bool) -> None:
    hyper = _hyperparameters(case.rule)
    state = _start(case) if resumed else {}
    drawn = [_draw(1 + number) for number in range(1 + STEPS)]
    inputs = [*drawn, *state.values(), *_spread(hyper)]
    assert torch.autograd.gradcheck(
        lambda *tensors: _trained(case, list(tensors), hyper, list(state)),
        tuple(inputs),
        fast_mode=True,
    )


def test_gradients_flow_through_what_parameters_share() -> None:
    """The norm of all gradients together depends on each of them."""
    clipped = stepwell.compose(stepwell.Adam, ClipNorm)

    def two_steps(one: Tensor, other: Tensor, first: Tensor, second: Tensor, most: Tensor) -> Any:
        params = [one.clone(), other.clone()]
        optimizer = clipped(params, lr=0.1, max_norm=most, differentiable=True)
        for factor in (1, 2):
            params[0].grad, params[1].grad = first * factor, second
            optimizer.step()
        return tuple(params)

    most = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(two_steps, (*map(_draw, range(4)), most))
