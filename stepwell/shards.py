"""Distributed tensors, for work that needs the whole of them on every process."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_sharded", "mean_over", "part_of", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is a DTensor, as with FSDP2 and tensor parallelism."""
    # as long as nobody has loaded the module, there are none
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> Tensor:
    """All of a DTensor, on every process; any other tensor itself."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return full


def part_of(whole: Tensor, like: Any) -> Tensor:
    """A tensor that all processes have, distributed like a DTensor; nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part: Tensor = everywhere.redistribute(placements=like.placements)
    return part


def mean_over(mesh: Any, number: float) -> float:
    """The mean of the numbers that the processes of a mesh have, the same on all of them."""
    from torch.distributed.tensor import DTensor, Partial

    share = torch.tensor(number / mesh.size(), dtype=torch.float64, device=mesh.device_type)
    pending: Any = DTensor.from_local(share, mesh, [Partial()] * mesh.ndim, run_check=False)
    return float(pending.full_tensor())
