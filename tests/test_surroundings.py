"""Is a step the same whatever surrounds it: default devices, default dtypes, fake tensors?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import stepwell
from stepwell.language import ClipNorm
from stepwell.native.triton_jit import is_interpreting

from .cases import CLASSES, REQUESTS, numbers
from .compare import assert_same_training, assert_training_within, default_dtype, snapshot
from .rules import RULES

Surroundings = Callable[[], AbstractContextManager[Any]]
OURS = [getattr(stepwell, name) for name in CLASSES]
ALL = [*OURS, *RULES, stepwell.compose(stepwell.AdamW, ClipNorm)]


def _grad(rule: type[Any], step: int) -> Tensor:
    grad = numbers((4, 3), torch.float32, 10 + step)
    return grad.to_sparse(1) if rule is stepwell.SparseAdam else grad


def _step(optimizer: Any, params: list[Any]) -> None:
    if isinstance(optimizer, stepwell.LBFGS):
        optimizer.step(lambda: 0.5 * sum((param.detach() ** 2).sum() for param in params))
    else:
        optimizer.step()


def _flags(rule: type[Any], request: str) -> dict[str, bool]:
    fields = rule.declaration.fields
    return {name: value for name, value in REQUESTS[request].items() if name in fields}


# Defaults


DEFAULTS: dict[str, Surroundings] = {
    "meta": lambda: torch.device("meta"),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
}


def _trained(rule: type[Any], flags: Any, around: Surroundings, rate: float | Tensor) -> Any:
    params = [nn.Parameter(numbers((4, 3), torch.float32, i)) for i in range(2)]
    optimizer = rule(params, lr=rate, **flags)
    for step in range(4):
        for param in params:
            param.grad = _grad(rule, step)
        # what is made at first is made within, and read without, and the other way round
        with around() if step != 2 else nullcontext():
            _step(optimizer, params)
        if step == 1:
            state = optimizer.state_dict()
            optimizer = rule(params, lr=rate, **flags)
            with around():
                optimizer.load_state_dict(state)
    return optimizer


def _numbers(optimizer: Any) -> dict[Any, Tensor]:
    found = snapshot(optimizer)
    scalars = {e for e, tensor in found.items() if e.kind != "param" and not tensor.dim()}
    return {e: tensor.float() if e in scalars else tensor for e, tensor in found.items()}


# with TRITON_INTERPRET=1, which takes its time, some go through the kernels for GPUs
@pytest.mark.interpret
@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("rule", ALL[::6] if is_interpreting() else ALL)
def test_defaults_of_the_session(rule: type[Any], request_: str, default: str) -> None:
    flags = _flags(rule, request_)
    for rate in (0.02, torch.tensor(0.02)):
        one, other = (
            _trained(rule, flags, around, rate) for around in (DEFAULTS[default], nullcontext)
        )
        if default == "float64":
            # as in torch, what is one number of a parameter is then kept in float64
            assert_training_within(_numbers(one), _numbers(other), 64, f"default {default}")
        else:
            assert_same_training(one, other, f"default {default}")


# Tensors without numbers, as tools have them that estimate memory


def _train_without_numbers(rule: type[Any], flags: Any, device: str) -> None:
    params = [nn.Parameter(torch.randn(4, 3, device=device)) for _ in range(2)]
    optimizer = rule(params, **flags)
    for _ in range(2):
        for param in params:
            grad = torch.randn(4, 3, device=device)
            param.grad = grad.to_sparse(1) if rule is stepwell.SparseAdam else grad
        optimizer.step()
    if "lr" not in flags:
        # torch cannot copy fake tensors, as a group's would be
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    for param, state in optimizer.state.items():
        whole = [value for value in state.values() if value.shape == param.shape]
        assert all(value.device == param.device for value in whole)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("rule", [rule for rule in ALL if rule is not stepwell.LBFGS])
def test_fake_tensors(rule: type[Any], request_: str) -> None:
    with FakeTensorMode():
        _train_without_numbers(rule, _flags(rule, request_), "cpu")
        _train_without_numbers(rule, {**_flags(rule, request_), "lr": torch.tensor(0.1)}, "cpu")


@pytest.mark.parametrize("request_", ["eager", "foreach"])
@pytest.mark.parametrize(
    "rule", [rule for rule in ALL if rule not in (stepwell.LBFGS, stepwell.SparseAdam)]
)
def test_the_meta_device(rule: type[Any], request_: str) -> None:
    """torch has no sparse tensors there, and refuses `fused=True`."""
    _train_without_numbers(rule, _flags(rule, request_), "meta")


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Adafactor"])
def test_fake_tensors_of_a_device_that_is_not_here(name: str) -> None:
    with FakeTensorMode():
        _train_without_numbers(getattr(stepwell, name), {}, "cuda")


def test_a_scaler_of_fake_tensors() -> None:
    with FakeTensorMode():
        param = nn.Parameter(torch.randn(4))
        optimizer = stepwell.AdamW([param])
        param.grad = torch.randn(4)
        optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())
        optimizer.step()
    assert optimizer.state[param]
