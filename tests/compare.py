"""Comparisons that raise by themselves, and say where two results differ and by how much.

One ULP of a number is the distance to its neighbours among the numbers of its dtype. A sum that
nearly cancels carries the rounding of its terms, so no element is judged finer than one of the
mean size of its kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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


def typical(tensors: Iterable[Tensor]) -> float:
    """The mean size of the finite numbers of these tensors."""
    total, count = 0.0, 0
    for tensor in tensors:
        sizes = real(tensor).double().abs()
        finite = sizes.isfinite()
        total += float(torch.where(finite, sizes, 0.0).sum())
        count += int(finite.sum())
    return total / max(count, 1)


def ulps(actual: Tensor, expected: Tensor, size: float | None = None) -> Tensor:
    """The difference of each element in ULPs of `actual`'s dtype; inf where only one is NaN.

    Elements smaller than `size`, the typical one of the tensor by default, are judged as if they
    were of that size.
    """
    a, b = real(actual).double(), real(expected).double()
    floor = typical([expected]) if size is None else size
    distance = (a - b).abs() / spacing(b.abs().clamp(min=floor), real(actual).dtype)
    alike = (a == b) | (a.isnan() & b.isnan())
    return torch.where(alike, 0.0, torch.nan_to_num(distance, nan=torch.inf))


def _place(tensor: Tensor, flat: int) -> str:
    index = torch.unravel_index(torch.tensor(flat), tensor.shape)
    return "[" + ", ".join(str(int(i)) for i in index) + "]"


def _assert_same_kind(actual: Tensor, expected: Tensor, what: str) -> None:
    __tracebackhide__ = True
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: got {actual.dtype} {tuple(actual.shape)}, "
            f"expected {expected.dtype} {tuple(expected.shape)}"
        )


def assert_within(
    actual: Tensor, expected: Tensor, limit: float, what: str, *, size: float | None = None
) -> None:
    """Raise unless all elements are within `limit` ULPs; NaN equals NaN."""
    __tracebackhide__ = True
    _assert_same_kind(actual, expected, what)
    found = ulps(actual, expected, size)
    if found.numel() and not float(found.max()) <= limit:
        worst = int(found.argmax())
        got, want = (float(real(t).reshape(-1)[worst]) for t in (actual, expected))
        raise AssertionError(
            f"{what}{_place(found, worst)}: got {got!r}, expected {want!r}: "
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
            f"{what}{_place(differs, first)}: got {got!r}, expected {want!r}, to the bit "
            f"({int(differs.sum())} of {differs.numel()} elements differ)"
        )


class Entry(NamedTuple):
    """One thing that training changes: a parameter (`kind` "param"), or an entry of its state."""

    index: int
    kind: str

    def __str__(self) -> str:
        return f"parameter {self.index}" + ("" if self.kind == "param" else f" {self.kind}")


def everything(optimizer: Any) -> dict[Entry, Tensor]:
    """All that training changes; parameters are numbered in the optimizer's order."""
    found: dict[Entry, Tensor] = {}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        found[Entry(index, "param")] = param.detach()
        for name, value in sorted(optimizer.state.get(param, {}).items()):
            for kind, item in _items(name, value):
                found[Entry(index, kind)] = torch.as_tensor(item).detach()
    return found


def _items(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """An entry of state; LBFGS has lists, and what has not started yet is None."""
    if isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _items(f"{name}.{number}", item)
    elif value is not None:
        yield name, value


Snapshot = Mapping[Entry, Tensor]


def snapshot(optimizer: Any) -> Snapshot:
    """A copy of `everything`."""
    return {entry: tensor.clone() for entry, tensor in everything(optimizer).items()}


def assert_training_within(actual: Any, expected: Any, limit: float, what: str) -> None:
    """`assert_within` for all that two optimizers (or snapshots of them) hold."""
    __tracebackhide__ = True
    pairs = _pairs(actual, expected, what)
    kinds = {entry.kind for entry in pairs}
    sizes = {k: typical(b for e, (_, b) in pairs.items() if e.kind == k) for k in kinds}
    for entry, (a, b) in pairs.items():
        assert_within(a, b, limit, f"{what}: {entry}", size=sizes[entry.kind])


def assert_same_training(actual: Any, expected: Any, what: str) -> None:
    """`assert_same_bits` for all that two optimizers (or snapshots of them) hold."""
    __tracebackhide__ = True
    for entry, (a, b) in _pairs(actual, expected, what).items():
        assert_same_bits(a, b, f"{what}: {entry}")


def _pairs(actual: Any, expected: Any, what: str) -> dict[Entry, tuple[Tensor, Tensor]]:
    __tracebackhide__ = True
    one, other = (o if isinstance(o, Mapping) else everything(o) for o in (actual, expected))
    if one.keys() != other.keys():
        more = ", ".join(map(str, sorted(one.keys() - other.keys())))
        less = ", ".join(map(str, sorted(other.keys() - one.keys())))
        raise AssertionError(f"{what}: has [{more}] too many, lacks [{less}]")
    return {entry: (one[entry], other[entry]) for entry in other}


def backends(optimizer: Any) -> set[str]:
    """The back-ends that the last step ran on."""
    return {line.partition(":")[0] for line in optimizer._held[0].describe()}


def threads(optimizer: Any) -> int:
    """The most threads that a launch of the last step ran on."""
    return max(getattr(launch, "_threads", 1) for launch in optimizer._held[0]._launches)


def files(folder: Path) -> list[str]:
    """The names of what is in a folder, in order."""
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors in this dtype unless they say otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
