"""Does nothing keep parameters, gradients or state alive once the user has let them go?

Reference counts alone must free them: tables of embeddings are too large to wait for the garbage
collector, which is off here.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.language import ClipNorm

from .cases import CLASSES, REQUESTS
from .rules import RULES

SHAPE = (6, 4)
SPARSE = ("SGD", "Adagrad", "SparseAdam")


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def _grad(sparse: bool) -> Tensor:
    grad = torch.zeros(SHAPE)
    grad[1] = 1.0
    return grad.to_sparse(1) if sparse else grad


def _step(optimizer: Any, sparse: bool = False) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = _grad(sparse)
    if isinstance(optimizer, stepwell.LBFGS):
        optimizer.step(lambda: 0.5 * sum((param * param).sum() for param in params))
    else:
        optimizer.step()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _left(make: Callable[[list[Any]], Any], use: Callable[[Any], Any]) -> list[str]:
    """Return the names of the objects that outlive an optimizer and all references to it."""
    params = [nn.Parameter(torch.ones(SHAPE)) for _ in range(2)]
    optimizer = make(params)
    kept = use(optimizer)
    held = _held(optimizer, params)
    del params, optimizer, kept
    return [name for name, ref in held.items() if ref() is not None]


def _held(optimizer: Any, params: list[Any]) -> dict[str, weakref.ref[Any]]:
    found: dict[str, Any] = {"optimizer": optimizer}
    for number, param in enumerate(params):
        found[f"parameter {number}"] = param
        if param.grad is not None:
            found[f"gradient {number}"] = param.grad
        for tensor in _tensors(optimizer.state.get(param, {})):
            found[f"state {len(found)}"] = tensor
    return {name: weakref.ref(value) for name, value in found.items()}


def _twice(optimizer: Any) -> None:
    _step(optimizer)
    _step(optimizer)


def _sparse(optimizer: Any) -> None:
    _step(optimizer, sparse=True)
    _step(optimizer, sparse=True)


def _sparse_then_dense(optimizer: Any) -> None:
    for sparse in (True, False, True):
        _step(optimizer, sparse)


def _one_of_each(optimizer: Any) -> None:
    first, second = (param for group in optimizer.param_groups for param in group["params"])
    for sparse in (True, True, False):
        first.grad, second.grad = _grad(sparse), _grad(False)
        optimizer.step()


def _failing(optimizer: Any) -> None:
    is_sparse = isinstance(optimizer, stepwell.SparseAdam)
    _step(optimizer, is_sparse)
    if isinstance(optimizer, stepwell.LBFGS):
        return
    # the gradient is now that of a larger one
    param = optimizer.param_groups[0]["params"][1]
    param.data = torch.ones(3, 4)
    with pytest.raises((RuntimeError, ValueError), match="shape"):
        optimizer.step()


def _raising_closure(optimizer: Any) -> None:
    def closure() -> Any:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)


def _hooked(optimizer: Any) -> list[Any]:
    handles = [
        optimizer.register_step_pre_hook(lambda *_: None),
        optimizer.register_step_post_hook(lambda *_: None),
        optimizer.register_state_dict_post_hook(lambda *_: None),
        optimizer.register_load_state_dict_pre_hook(lambda *_: None),
    ]
    _step(optimizer, isinstance(optimizer, stepwell.SparseAdam))
    optimizer.load_state_dict(optimizer.state_dict())
    return handles


def _scheduled(optimizer: Any) -> list[Any]:
    lr_scheduler = stepwell.lr_scheduler
    schedules = [
        lr_scheduler.StepLR(optimizer, 2),
        lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
        lr_scheduler.ReduceLROnPlateau(optimizer),
    ]
    for schedule in schedules:
        _step(optimizer, isinstance(optimizer, stepwell.SparseAdam))
        schedule.step(*([1.0] if schedule is schedules[-1] else []))
    return schedules


def _copied(optimizer: Any) -> Any:
    _step(optimizer, isinstance(optimizer, stepwell.SparseAdam))
    other = copy.deepcopy(optimizer)
    _step(other, isinstance(optimizer, stepwell.SparseAdam))
    other.load_state_dict(optimizer.state_dict())
    repr(optimizer)
    return other


def _regrouped(optimizer: Any) -> None:
    _step(optimizer, isinstance(optimizer, stepwell.SparseAdam))
    if not isinstance(optimizer, stepwell.LBFGS):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(SHAPE))]})
    _step(optimizer, isinstance(optimizer, stepwell.SparseAdam))
    optimizer.zero_grad()


USES = (_failing, _raising_closure, _hooked, _scheduled, _copied, _regrouped)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", CLASSES)
def test_whatever_was_done(name: str, use: Callable[[Any], Any]) -> None:
    assert _left(getattr(stepwell, name), use) == []


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "SparseAdam"])
def test_dense_gradients(name: str, request_: str) -> None:
    rule = getattr(stepwell, name)
    flags = {k: v for k, v in REQUESTS[request_].items() if k in rule.declaration.fields}
    assert _left(lambda params: rule(params, **flags), _twice) == []


@pytest.mark.parametrize("rule", [*RULES, stepwell.compose(stepwell.AdamW, ClipNorm)])
def test_rules_from_outside(rule: type[Any]) -> None:
    assert _left(rule, _twice) == []


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("use", [_sparse, _sparse_then_dense, _one_of_each])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients(name: str, use: Callable[[Any], Any], fused: bool | None) -> None:
    if name == "SparseAdam" and use is not _sparse:
        pytest.skip("it refuses dense gradients")
    assert _left(lambda params: getattr(stepwell, name)(params, fused=fused), use) == []


def test_a_differentiable_step_keeps_only_its_graph() -> None:
    def use(optimizer: Any) -> None:
        for _ in range(2):
            for param in optimizer.param_groups[0]["params"]:
                param.grad = _grad(False)
            optimizer.step()

    def make(params: list[Any]) -> Any:
        params[:] = [param.detach().requires_grad_().clone() for param in params]
        return stepwell.AdamW(params, differentiable=True)

    assert _left(make, use) == []
