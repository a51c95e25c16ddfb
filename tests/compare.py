"""Comparisons that raise by themselves, and say where two results differ and by how much.

One ULP of a number is the distance to its neighbours among the numbers of its dtype. A sum that
nearly cancels carries the rounding of its terms, so that no element is judged finer than one of
the tensor's mean size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# Bits of the mantissa, without the leading one.
DIGITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
# The smallest normal exponent; below it numbers are evenly spaced.
LOWEST = {torch.float64: -1022, torch.float32: -126, torch.float16: -14, torch.bfloat16: -126}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def real(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, of a complex one both parts."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def spacing(size: Tensor, dtype: torch.dtype) -> Tensor:
    """One ULP of numbers of this size, in float64."""
    _, exponent = torch.frexp(size.double())
    exponent = (exponent - 1).clamp(min=LOWEST[dtype]) - DIGITS[dtype]
    return torch.ldexp(torch.ones_like(size, dtype=torch.float64), exponent)


def ulps(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The difference of each element in ULPs of `dtype` (that of `actual`); inf where one is NaN."""
    dtype = dtype or real(actual).dtype
    a, b = real(actual).double(), real(expected).double()
    if not b.numel():
        return b
    size = b.abs()
    typical = torch.nan_to_num(size, nan=0.0, posinf=0.0).mean()
    distance = (a - b).abs() / spacing(torch.maximum(size, typical), dtype)
    alike = (a == b) | (a.isnan() & b.isnan())
    return torch.where(alike, 0.0, torch.nan_to_num(distance, nan=torch.inf))


def _where(tensor: Tensor, flat: int) -> str:
    index = torch.unravel_index(torch.tensor(flat), tensor.shape)
    return "[" + ", ".join(str(int(i)) for i in index) + "]"


def _assert_same_kind(actual: Tensor, expected: Tensor, what: str) -> None:
    __tracebackhide__ = True
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: got {actual.dtype} {tuple(actual.shape)}, "
            f"expected {expected.dtype} {tuple(expected.shape)}"
        )


def assert_within(actual: Tensor, expected: Tensor, limit: float, what: str) -> None:
    """Raise unless all elements are within `limit` ULPs; NaN equals NaN."""
    __tracebackhide__ = True
    _assert_same_kind(actual, expected, what)
    found = ulps(actual, expected)
    if found.numel() and not float(found.max()) <= limit:
        worst = int(found.argmax())
        pair = (float(real(t).reshape(-1)[worst]) for t in (actual, expected))
        got, want = pair
        raise AssertionError(
            f"{what}{_where(found, worst)}: got {got!r}, expected {want!r}: "
            f"{float(found.max()):.3g} ULP apart, allowed {limit:g} "
            f"({int((found > limit).sum())} of {found.numel()} elements are too far)"
        )


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raise unless all elements have the same bits, so that 0 is not -0."""
    __tracebackhide__ = True
    _assert_same_kind(actual, expected, what)
    a, b = real(actual).contiguous(), real(expected).contiguous()
    kind = INTEGERS[a.element_size()]
    differs = a.view(kind) != b.view(kind)
    if bool(differs.any()):
        first = int(differs.reshape(-1).nonzero()[0])
        got, want = (float(t.reshape(-1)[first]) for t in (a, b))
        raise AssertionError(
            f"{what}{_where(differs, first)}: got {got!r}, expected {want!r}, to the bit "
            f"({int(differs.sum())} of {differs.numel()} elements differ)"
        )


def everything(optimizer: Any) -> dict[str, Tensor]:
    """All that training changes: parameters and their state, by name, in the optimizer's order."""
    found: dict[str, Tensor] = {}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        found[f"param {index}"] = param.detach()
        for name, value in sorted(optimizer.state.get(param, {}).items()):
            # torch lists a momentum that has not started yet as None
            if value is not None:
                found[f"param {index} {name}"] = torch.as_tensor(value).detach()
    return found


def assert_training_within(
    actual: Any, expected: Any, limit: float, what: str, *, skip: Iterable[str] = ()
) -> None:
    """`assert_within` for parameters and state of two optimizers, which have the same entries."""
    __tracebackhide__ = True
    for name, (a, b) in _pairs(everything(actual), everything(expected), what).items():
        if not any(name.endswith(word) for word in skip):
            assert_within(a, b, limit, f"{what}: {name}")


def assert_same_training(actual: Any, expected: Any, what: str) -> None:
    """`assert_same_bits` for parameters and state of two optimizers."""
    __tracebackhide__ = True
    for name, (a, b) in _pairs(everything(actual), everything(expected), what).items():
        assert_same_bits(a, b, f"{what}: {name}")


def _pairs(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str
) -> dict[str, tuple[Tensor, Tensor]]:
    __tracebackhide__ = True
    if actual.keys() != expected.keys():
        more = sorted(actual.keys() - expected.keys())
        less = sorted(expected.keys() - actual.keys())
        raise AssertionError(f"{what}: has besides {more}, lacks {less}")
    return {name: (actual[name], expected[name]) for name in expected}


def backends(optimizer: Any) -> set[str]:
    """The back-ends that the last step ran on."""
    return {line.partition(":")[0] for line in optimizer._held[0].describe()}
