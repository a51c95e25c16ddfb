"""Rprop: steps of a size of their own per element, steered by the sign of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Annotated, Any

from torch import Tensor

from ..language import (
    Message,
    NonNegative,
    OwnFlag,
    Range,
    Real,
    clamp,
    count,
    full,
    sign,
    where,
    zeros,
)
from ..optimizer import Optimizer

__all__ = ["Rprop"]


Eta = Annotated[float | Tensor, Range(), Message("Invalid eta values: {values}")]


class Rprop(Optimizer):
    """Steps of a size of their own per element, of which only the gradient's sign decides.

        agreement <- g prev
        factor <- where(agreement > 0, etas.1, where(agreement < 0, etas.0, 1))
        step_size <- min(max(step_size factor, step_sizes.0), step_sizes.1)
        prev <- where(agreement < 0, 0, g)
        p <- p - sign(prev) step_size

    Paper: Riedmiller and Braun, A Direct Adaptive Method for Faster Backpropagation Learning: The
    RPROP Algorithm, ICNN 1993.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the size of the first step
        etas: by how much the size shrinks after a change of sign, and grows otherwise
        step_sizes: the smallest and the largest size
        capturable: keep step counts on the accelerator, so that a graph can hold the step
        foreach: use the back-end that updates many tensors per call
        maximize: climb instead of descend
        differentiable: let autograd through the step
        fused: use the back-end that updates all tensors in one kernel

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = Rprop([weight], lr=0.1)
    >>> for _ in range(2):
    ...     weight.grad = torch.tensor([0.5])
    ...     optimizer.step()  # 1 - 0.1 - 0.1 * 1.2
    >>> round(weight.item(), 4)
    0.78
    """

    lr: NonNegative = 1e-2
    etas: tuple[Eta, Eta] = (0.5, 1.2)
    step_sizes: tuple[Real, Real] = (1e-6, 50)
    _: KW_ONLY
    capturable: bool = False
    foreach: bool | None = None
    maximize: bool = False
    differentiable: bool = False
    fused: OwnFlag = None

    step = count()
    prev = zeros()
    step_size = full("lr")

    @staticmethod
    def check(group: Mapping[str, Any]) -> str | None:
        """One factor shrinks, the other grows."""
        shrink, grow = group["etas"]
        if not 0 < shrink < 1 < grow:
            return f"Invalid eta values: {shrink}, {grow}"
        return None

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        shrink, grow = group.etas
        agreement = grad * state.prev
        factor = where(agreement > 0, grow, where(agreement < 0, shrink, 1.0))
        state.step_size = clamp(state.step_size * factor, *group.step_sizes)
        state.prev = where(agreement < 0, 0.0, grad)
        return param - sign(state.prev) * state.step_size
