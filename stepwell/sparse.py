"""Sparse gradients: whether their rows are rows of the parameter, and what they are said to be."""

from __future__ import annotations

import torch
from torch import Tensor

from .language.number import is_fake

__all__ = ["as_it_says", "check_rows"]


def check_rows(grad: Tensor, what: str) -> None:
    """Hold the indices of a sparse tensor against its shape, which torch does only if asked to.

    Whoever trusts an index that is out of range writes into somebody else's memory.

    Raises:
        RuntimeError: an index is negative, or too large
    """
    if is_fake(grad):
        return
    indices = grad._indices()
    sizes = torch.tensor(grad.shape[: grad.sparse_dim()], device=indices.device)
    outside = (indices < 0) | (indices >= sizes.unsqueeze(1))
    if bool(outside.any()):
        dim, entry = outside.nonzero()[0].tolist()
        raise RuntimeError(
            f"{what} has index {int(indices[dim, entry])} in dimension {dim}, which has size "
            f"{grad.shape[dim]}; torch.sparse.check_sparse_tensor_invariants finds who made it"
        )


def as_it_says(grad: Tensor) -> Tensor:
    """The gradient, called uncoalesced if it says that it is coalesced and is not.

    torch takes the word of whoever made it, and then updates rows that are there twice one way or
    another.
    """
    if is_fake(grad) or not grad.is_coalesced() or _ascends(grad):
        return grad
    return torch.sparse_coo_tensor(
        grad._indices(), grad._values(), grad.shape, is_coalesced=False, check_invariants=False
    )


def _ascends(grad: Tensor) -> bool:
    """Whether each row comes after the one before it."""
    indices = grad._indices()
    numbers = indices[0] if len(indices) else indices.new_zeros(indices.shape[1])
    for index, size in zip(indices[1:], grad.shape[1:], strict=False):
        numbers = numbers * size + index
    return bool((numbers[1:] > numbers[:-1]).all())
