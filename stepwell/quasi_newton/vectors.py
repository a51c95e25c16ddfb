"""All parameters as one vector of reals, and what is measured on such vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..shards import whole

__all__ = ["dot", "empty_vector", "flat_grad", "largest", "reals"]


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


def flat_grad(param: Tensor) -> Tensor:
    """The gradient as a vector of reals; zeros if there is none.

    Raises:
        RuntimeError: it is no gradient of this parameter
    """
    grad = torch.zeros_like(param) if param.grad is None else param.grad
    if (
        grad.shape != param.shape
        or grad.device != param.device
        or grad.is_complex() != param.is_complex()
    ):
        raise RuntimeError(f"its gradient is {_kind(grad)}, the parameter {_kind(param)}")
    dense = whole(grad if grad.layout is torch.strided else grad.to_dense())
    return reals(dense.resolve_conj()).reshape(-1)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


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
