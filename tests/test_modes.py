"""Does a rule take the same steps on every back-end whatever mode of torch is around them?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import stepwell

from .cases import CLASSES, REQUESTS, numbers
from .compare import default_dtype

pytestmark = pytest.mark.interpret

RULES = [name for name in CLASSES if name not in ("LBFGS", "Muon")]


AROUND: dict[str, Callable[[], Any]] = {
    "another device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
}


def _made(name: str, request: dict[str, bool], params: list[Any], **options: Any) -> Any:
    rule = getattr(stepwell, name)
    if name == "SparseAdam":
        request = {key: value for key, value in request.items() if key == "fused"}
    return rule(params, lr=torch.tensor(0.05), **request, **options)


def _walked(name: str, request: dict[str, bool], around: Any, outer: Any = nullcontext) -> Any:
    """Return the parameters after three steps with a load in the middle."""
    with outer():
        params = [torch.nn.Parameter(numbers((4, 3), torch.float32, i)) for i in range(3)]
        optimizer = _made(name, request, params)
        for step in range(3):
            for index, param in enumerate(params):
                grad = numbers((4, 3), torch.float32, 10 * step + index + 5)
                param.grad = grad.to_sparse(1) if name == "SparseAdam" else grad
            with around():
                optimizer.step()
                if step == 1:
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return [param.detach() for param in params]


def _close(found: list[Tensor], expected: list[Tensor], where: str) -> None:
    # where doubles are the default, counts are doubles, and 1 - beta^t is rounded less
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=lambda m: f"{where}: {m}")


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=[*REQUESTS])
@pytest.mark.parametrize("around", AROUND.values(), ids=[*AROUND])
def test_what_is_around_a_step_changes_nothing(around: Any, request_: dict[str, bool]) -> None:
    for name in RULES:
        expected = _walked(name, request_, nullcontext)
        _close(_walked(name, request_, around), expected, name)


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=[*REQUESTS])
def test_parameters_made_in_inference_mode(request_: dict[str, bool]) -> None:
    """As strategies of evolution have them: also beside others, and outside of that mode."""
    for name in RULES:
        expected = _walked(name, request_, nullcontext)
        _close(_walked(name, request_, nullcontext, torch.inference_mode), expected, name)
        with torch.inference_mode():
            made = torch.nn.Parameter(numbers((4, 3), torch.float32, 0))
        params = [made, torch.nn.Parameter(numbers((4, 3), torch.float32, 1))]
        starts = [param.detach().clone() for param in params]
        optimizer = _made(name, request_, params)
        for mode in (False, True, False):
            for param in params:
                grad = torch.ones(4, 3)
                param.grad = grad.to_sparse(1) if name == "SparseAdam" else grad
            with torch.inference_mode(mode):
                optimizer.step()
        for param, start in zip(params, starts, strict=True):
            assert not (param == start).any(), name
