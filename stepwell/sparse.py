"""Sparse gradients: whether their rows are rows of the parameter at all."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_rows"]


def check_rows(grad: Tensor, what: str) -> None:
    """Hold the indices of a sparse tensor against its shape, which torch does only if asked to.

    Whoever trusts an index that is out of range writes into somebody else's memory.

    Raises:
        RuntimeError: an index is negative, or too large
    """
    indices = grad._indices()
    sizes = torch.tensor(grad.shape[: grad.sparse_dim()], device=indices.device)
    outside = (indices < 0) | (indices >= sizes.unsqueeze(1))
    if bool(outside.any()):
        dim, entry = outside.nonzero()[0].tolist()
        raise RuntimeError(
            f"{what} has index {int(indices[dim, entry])} in dimension {dim}, which has size "
            f"{grad.shape[dim]}; torch.sparse.check_sparse_tensor_invariants finds who made it"
        )
