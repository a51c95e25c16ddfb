"""Does each class take every kind of parameter and gradient, or refuse it and say what to use?

Where torch takes an input, its numbers are the reference; where it does not and we do, its numbers
for the same input in plain form are. What is refused is refused before anything has changed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import stepwell

from .cases import CLASSES, named, numbers
from .compare import assert_within, real

pytestmark = pytest.mark.filterwarnings("ignore:.*[Ss]parse")

# rates under which each of them moves, and Muon's products as torch has them
OPTIONS: dict[str, dict[str, Any]] = {"Adadelta": {"lr": 0.5}, "LBFGS": {"lr": 0.1, "max_iter": 2}}
OURS: dict[str, dict[str, Any]] = {"Muon": {"ns_dtype": "bfloat16"}}

STEPS = 3


class Kind(NamedTuple):
    """How parameters and gradients are made; by number, so that each step has its own gradient."""

    param: Callable[[], Tensor]
    grad: Callable[[int], Tensor]
    # what a refusal has to name
    remedy: str = ""

    def __str__(self) -> str:
        return next(name for name, kind in KINDS.items() if kind is self)


def _plain(*shape: int, dtype: torch.dtype = torch.float32, remedy: str = "") -> Kind:
    return Kind(
        lambda: numbers(shape, dtype, 1), lambda step: numbers(shape, dtype, 2 + step), remedy
    )


def _laid(lay_out: Callable[[Tensor], Tensor], *shape: int) -> Kind:
    """Parameter and gradient lie in memory in this manner."""
    return Kind(
        lambda: lay_out(numbers(shape, torch.float32, 1)),
        lambda step: lay_out(numbers(shape, torch.float32, 2 + step)),
    )


def _rows(step: int) -> Tensor:
    """Two rows of five, one of them twice."""
    rows = torch.tensor([[step % 5, (step + 2) % 5, step % 5]])
    values = numbers((3, 4), torch.float32, 2 + step)
    return torch.sparse_coo_tensor(rows, values, (5, 4), check_invariants=True)


MATRIX = numbers((5, 4), torch.float32, 1)
USE_OTHERS = "SparseAdam|AdamW|Adam instead|dense"
KINDS: dict[str, Kind] = {
    "float64": _plain(5, 4, dtype=torch.float64),
    "float16": _plain(5, 4, dtype=torch.float16),
    "bfloat16": _plain(5, 4, dtype=torch.bfloat16),
    "complex": _plain(5, 4, dtype=torch.complex64, remedy="AdamW"),
    "whole numbers": Kind(
        lambda: torch.ones(5, 4, dtype=torch.int32),
        lambda step: torch.ones(5, 4, dtype=torch.int32),
        "leave it out|floating point",
    ),
    "empty": _plain(0, 4),
    "no columns": _plain(4, 0),
    "no dimension": _plain(remedy="AdamW"),
    "one dimension": _plain(7, remedy="AdamW"),
    "four dimensions": _plain(4, 3, 2, 2),
    "transposed": _laid(lambda t: t.T, 5, 4),
    "channels last": _laid(lambda t: t.to(memory_format=torch.channels_last), 4, 3, 2, 2),
    "with gaps": _laid(lambda t: t[:, ::2], 5, 8),
    "a gradient that is turned": Kind(
        MATRIX.clone, lambda step: numbers((4, 5), torch.float32, 2 + step).T
    ),
    "an expanded gradient": Kind(MATRIX.clone, lambda step: torch.tensor(0.5 + step).expand(5, 4)),
    "an expanded parameter": Kind(
        lambda: torch.ones(1, 4).expand(5, 4), lambda step: MATRIX, "[Pp]lease clone()"
    ),
    "a sparse gradient": Kind(MATRIX.clone, _rows, USE_OTHERS),
    "a sparse gradient without rows": Kind(
        MATRIX.clone, lambda step: torch.zeros(5, 4).to_sparse(), USE_OTHERS
    ),
    "a sparse parameter": Kind(lambda: MATRIX.to_sparse(), _rows, USE_OTHERS),
}


class End(NamedTuple):
    """The parameter after some steps, or the error that came instead."""

    param: Tensor
    error: Exception | None
    optimizer: Any


def _train(library: Any, name: str, kind: Kind) -> End:
    param = torch.nn.Parameter(kind.param(), requires_grad=kind.param().dtype.is_floating_point)
    options = OPTIONS.get(name, {}) | (OURS.get(name, {}) if library is stepwell else {})
    optimizer = None
    try:
        optimizer = getattr(library, name)([param], **options)
        closure = inspect.signature(optimizer.step).parameters["closure"]
        for step in range(STEPS):
            param.grad = kind.grad(step)
            if closure.default is inspect.Parameter.empty:
                optimizer.step(lambda: torch.tensor(1.0))
            else:
                optimizer.step()
    except Exception as error:
        return End(param.detach(), error, optimizer)
    return End(param.detach(), None, optimizer)


def _in_plain_form(kind: Kind) -> Kind:
    """The same numbers, dense and one after the other."""

    def plain(tensor: Tensor) -> Tensor:
        return tensor.to_dense().contiguous()

    return Kind(lambda: plain(kind.param()), lambda step: plain(kind.grad(step)))


def _limit(name: str, dtype: torch.dtype) -> float:
    """In ULP of the mean size."""
    if name == "Muon":
        # products in bfloat16, of which a step moves less than the parameter's size
        return 0.01 / torch.finfo(dtype).eps
    if name == "NAdam" and dtype is torch.float64:
        # torch reads the product of its momenta back from float32
        return 2**22
    # torch rounds to half precision after every operation, some of them twice over
    return 16 if dtype in (torch.float16, torch.bfloat16) else 64


@pytest.mark.parametrize("kind", **named([*KINDS.values()]))
@pytest.mark.parametrize("name", CLASSES)
def test_taken_or_refused(name: str, kind: Kind) -> None:
    ours, theirs = (_train(library, name, kind) for library in (stepwell, torch.optim))
    if ours.error is not None:
        _assert_refused(name, kind, ours)
        return
    if theirs.error is not None:
        theirs = _train(torch.optim, name, _in_plain_form(kind))
    if theirs.error is not None:
        # torch divides by the number of elements, or flattens nothing
        assert name == "Muon" or not ours.param.numel(), repr(theirs.error)
        return
    got, expected = (end.param.to_dense() for end in (ours, theirs))
    size = float(real(expected).double().abs().mean()) if expected.numel() else 0.0
    assert_within(got, expected, _limit(name, got.real.dtype), f"{name}, {kind}", size=size)


def _assert_refused(name: str, kind: Kind, end: End) -> None:
    """In one sentence, with whose it is and what to do; and before anything has changed."""
    said = str(end.error)
    assert isinstance(end.error, (RuntimeError, TypeError, ValueError)), repr(end.error)
    assert name in said
    # one that is for sparse gradients alone names the rule for others, whatever they are
    remedy = "(consider|leave them to) Adam" if getattr(stepwell, name).sparse_only else kind.remedy
    assert remedy, f"{name} refuses {kind}: {said}"
    assert re.search(f"{remedy}|{kind.remedy or remedy}", said), said
    assert "\n" not in said
    assert torch.equal(end.param.to_dense(), kind.param().to_dense())
    if end.optimizer is not None and not end.optimizer.starts_with_state:
        assert not any(end.optimizer.state.values())


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "SparseAdam"])
def test_nested_tensors_are_refused_by_their_name(name: str) -> None:
    parts = [torch.ones(2, 2), torch.ones(3, 2)]
    param = torch.nn.Parameter(torch.nested.nested_tensor(parts, layout=torch.jagged))
    what = r"nested tensors \(.*\): .*to_padded_tensor"

    def step() -> None:
        optimizer = getattr(stepwell, name)([param])
        param.grad = torch.ones_like(param)
        optimizer.step()

    with pytest.raises(RuntimeError, match=f"{name} does not support {what}"):
        step()
