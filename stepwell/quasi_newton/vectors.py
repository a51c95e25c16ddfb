"""All parameters as one vector of reals, and what is measured on such vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dot", "empty_vector", "flattened", "largest", "reals"]


def reals(tensor: Tensor) -> Tensor:
    """The numbers of a tensor; of a complex one, both parts in a last dimension of two."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def empty_vector(params: Sequence[Tensor]) -> Tensor:
    """A vector of reals, as long as all parameters; sums over half precision need more digits."""
    dtype = torch.float32
    for kind in {param.dtype for param in params}:
        dtype = torch.promote_types(dtype, kind.to_real())
    size = sum(param.numel() * (2 if param.is_complex() else 1) for param in params)
    return torch.empty(size, dtype=dtype, device=params[0].device)


def flattened(grad: Tensor) -> Tensor:
    """A gradient as a vector of reals."""
    if grad.layout is not torch.strided:
        grad = grad.to_dense()
    if grad.is_complex():
        grad = torch.view_as_real(grad.resolve_conj())
    return grad.reshape(-1)


def largest(values: Tensor) -> float:
    """The largest absolute value; NaN if there is one."""
    return torch.linalg.vector_norm(values, math.inf).item() if values.numel() else 0.0


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product; not finite if an element is not."""
    product = torch.dot(a, b).item()
    if math.isfinite(product):
        return product
    # it may have overflowed
    return torch.dot(a.double(), b.double()).item()


def sum_of_sizes(values: Tensor) -> float:
    """The sum of all absolute values, which would overflow in float32 sooner."""
    return float(torch.linalg.vector_norm(values, 1, dtype=torch.float64))
