"""Parts that several libraries' state has in common: checked as they are read.

Moments in 4 or 8 bits are codes. A moment is the number that its code stands for, in a book of 16
or 256, times the largest size in its block, a run of the flattened tensor.

Paper: Dettmers, Lewis, Shleifer and Zettlemoyer, 8-bit Optimizers via Block-wise Quantization,
arXiv:2110.02861.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from ..header import CheckpointError

__all__ = [
    "Library",
    "check_keys",
    "count",
    "is_whole",
    "looked_up",
    "moment",
    "number",
    "scaled",
]


class Library(NamedTuple):
    """How a library keeps AdamW.

    Attributes:
        said: what the user is told that a file holds
        is_one: whether this is a group, or the state of a parameter, of this library
        group: a group with hyperparameters of torch
        entry: the state of a parameter under torch's keys, given its group and its name
    """

    said: str
    is_one: Callable[[Mapping[str, Any]], bool]
    group: Callable[[Mapping[str, Any]], dict[str, Any]]
    entry: Callable[[Mapping[str, Any], Mapping[str, Any], str], dict[str, Tensor]]


def is_whole(value: Any) -> TypeGuard[Tensor]:
    """Whether this is a dense tensor whose elements all lie in the file."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_meta
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def check_keys(entry: Mapping[str, Any], name: str, owner: str, *allowed: set[str]) -> None:
    """Check that the state of a parameter has exactly one of these sets of keys.

    Raises:
        CheckpointError: it has others; they are listed
    """
    if set(entry) not in allowed:
        listed = ", or ".join(", ".join(sorted(keys)) for keys in allowed)
        found = ", ".join(map(str, entry)) or "nothing"
        raise CheckpointError(f"{name}: state is {found:.300}; AdamW of {owner} has {listed}")


def number(values: Mapping[str, Any], key: str, what: str) -> float:
    """A hyperparameter, or a count: one number, perhaps in a tensor.

    Raises:
        CheckpointError: it is none, or negative, or not finite
    """
    value = values.get(key)
    if is_whole(value) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise CheckpointError(f"{what}: {key} must be one number, 0 or more, got {value!r:.40}")
    return value


def count(values: Mapping[str, Any], name: str) -> Tensor:
    """The number of steps, as torch keeps it."""
    return torch.tensor(number(values, "step", name), dtype=torch.float32, device="cpu")


def moment(value: Any, what: str) -> Tensor:
    """A moment that is not quantized, in float32 or wider.

    Raises:
        CheckpointError: it is no tensor of real numbers
    """
    if not is_whole(value) or not value.is_floating_point():
        raise CheckpointError(f"{what} must be a tensor of real numbers")
    return value.to(torch.promote_types(value.dtype, torch.float32))


def looked_up(codes: Any, book: Any, size: int, what: str) -> Tensor:
    """The numbers that codes stand for, flat, in float32.

    Raises:
        CheckpointError: these are no codes, or that is no book of this size
    """
    if not is_whole(codes) or codes.dtype != torch.uint8:
        raise CheckpointError(f"{what}: codes must be a whole tensor of uint8")
    if not is_whole(book) or book.shape != (size,) or not book.is_floating_point():
        raise CheckpointError(f"{what}: the book of codes must hold {size} numbers")
    return book.float().index_select(0, codes.flatten().int())


def scaled(values: Tensor, scales: Any, block: int, what: str) -> Tensor:
    """Flat values times the scale of their block; the last block may be shorter than `block`.

    Raises:
        CheckpointError: there are more or fewer scales than blocks, or one is none
    """
    blocks = -(-values.numel() // block)
    if not is_whole(scales) or scales.shape != (blocks,) or not scales.is_floating_point():
        raise CheckpointError(
            f"{what}: {values.numel():,} numbers in blocks of {block:,} must have {blocks:,} scales"
        )
    found: Tensor = values * scales.float().repeat_interleave(block)[: values.numel()]
    if not (bool(found.isfinite().all()) and bool((scales >= 0).all())):
        raise CheckpointError(f"{what}: codes or scales are not finite, or a scale is negative")
    return found
