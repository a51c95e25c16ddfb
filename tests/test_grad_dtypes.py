"""Are gradients taken in any precision, whatever that of their parameter is?

torch lets `Tensor.grad_dtype`, and hooks of autograd, leave such. The gradients here are numbers
that every dtype holds, so that nothing may depend on the dtype that they come in.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.language import ClipNorm
from stepwell.native.triton_jit import is_interpreting

from .cases import CLASSES, PLAIN, REQUESTS, Case, _case, numbers
from .compare import assert_same_training, assert_training_within, backends, everything
from .rules import RULES

# with TRITON_INTERPRET=1 these go through the kernels for GPUs
pytestmark = pytest.mark.interpret

PAIRS = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float32),
    (torch.complex64, torch.complex128),
]
CLIPPED = _case(stepwell.compose(stepwell.AdamW, ClipNorm), None, max_norm=0.5)
CASES = [(case, pair) for case in PLAIN for pair in PAIRS if case.takes(pair[0])]
# each pair is compiled anew: of the others, one
CASES += [(case, PAIRS[0]) for case in (CLIPPED, *(_case(rule, None) for rule in RULES))]


def _grad(dtype: torch.dtype, seed: int) -> Tensor:
    coarse = numbers((4, 6), torch.complex64 if dtype.is_complex else torch.float32, seed)
    real = torch.view_as_real(coarse) if dtype.is_complex else coarse
    # a few digits near 1, which half precision holds too
    real.copy_((real * 16).round() / 16)
    return coarse.to(dtype)


def _trained(
    make: Any, param_dtype: torch.dtype, grad_dtype: torch.dtype, sparse: bool = False
) -> Any:
    params = [nn.Parameter(numbers((4, 6), param_dtype, i)) for i in range(2)]
    for param in params:
        param.grad_dtype = None
    optimizer = make(params)
    for step in range(4):
        for i, param in enumerate(params):
            grad = _grad(grad_dtype, 10 + 7 * step + i)
            # the second comes late
            param.grad = None if i > step else grad.to_sparse(1) if sparse else grad
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("case", "pair"), CASES, ids=[f"{case.name}-{pair[0]}-{pair[1]}" for case, pair in CASES]
)
def test_any_precision(case: Case, pair: tuple[torch.dtype, torch.dtype]) -> None:
    for request, flags in REQUESTS.items():
        one, other = (
            _trained(lambda p, f=flags: case.make(p, **f), pair[0], dtype)
            for dtype in (pair[1], pair[0])
        )
        assert backends(one) == backends(other)
        assert_same_training(one, other, f"{case.name} on {request}, {pair}")


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("pair", PAIRS[:-1], ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_sparse_gradients(name: str, pair: Any, fused: bool | None) -> None:
    rule = getattr(stepwell, name)
    one, other = (
        _trained(lambda p: rule(p, lr=0.1, fused=fused), pair[0], dtype, sparse=True)
        for dtype in (pair[1], pair[0])
    )
    assert_same_training(one, other, f"{name}, {pair}")


@pytest.mark.parametrize("pair", PAIRS[:-1], ids=str)
@pytest.mark.parametrize("name", ["Muon", "LBFGS"])
def test_rules_that_are_no_formula(name: str, pair: Any) -> None:
    def trained(dtype: torch.dtype) -> Any:
        param = nn.Parameter(numbers((4, 6), pair[0], 1))
        param.grad_dtype = None
        optimizer = getattr(stepwell, name)([param], lr=0.1)
        for step in range(3):
            param.grad = _grad(dtype, step)
            closure = {"closure": lambda: (param.detach().double() ** 2).sum()}
            optimizer.step(**(closure if name == "LBFGS" else {}))
        return {e: t for e, t in everything(optimizer).items() if t.is_floating_point()}

    one, other = trained(pair[1]), trained(pair[0])
    assert_training_within(one, other, 4, f"{name}, {pair}")


@pytest.mark.skipif(is_interpreting(), reason="rows and columns have no kernels for GPUs yet")
def test_all_classes_are_asked() -> None:
    asked = {case.rule.__name__ for case in PLAIN} | {"Muon", "LBFGS", "SparseAdam"}
    assert asked == set(CLASSES)


@pytest.mark.parametrize("request_", REQUESTS)
def test_gradients_that_autograd_leaves(request_: str) -> None:
    """Sums in float32 for a parameter in bfloat16."""
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    optimizer = stepwell.SGD([weight], lr=1.0, **REQUESTS[request_])
    for factor in (1.0, 2**-10):
        (weight.float() * factor).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32
    optimizer.step()
    assert weight.grad.tolist() == [1 + 2**-10] * 8
    # 1 - 1.0009765625, where a gradient in bfloat16 would have left 0
    assert weight.tolist() == [-(2**-10)] * 8
