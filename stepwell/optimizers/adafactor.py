"""Adafactor: second moments of a matrix kept as those of its rows and columns."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Annotated, Any

from torch import Tensor

from ..language import (
    Message,
    OwnFlag,
    Range,
    epsilon,
    lerp,
    maximum,
    mean,
    minimum,
    sqrt,
    where,
    zeros,
)
from ..optimizer import Optimizer

__all__ = ["Adafactor"]

Number = float | Tensor
Rate = Annotated[Number, Range(0), Message("Learning rate should be >= 0 but is: {value}")]
Power = Annotated[Number, Range(high=0), Message("beta2_decay should be <= 0 but is: {value}")]
Epsilon1 = Annotated[Number, Range(0), Message("epsilon1 should be >= 0 but is: {value}")]
Epsilon2 = Annotated[Number, Range(0), Message("epsilon2 should be >= 0 but is: {value}")]
Threshold = Annotated[
    Number, Range(1), Message("Clipping threshold d should be >= 1 but is: {value}")
]
Shrinkage = Annotated[Number, Range(0), Message("weight_decay should be >= 0 but is: {value}")]


class Adafactor(Optimizer):
    """Steps relative to the size of the parameter, with second moments of rows and columns alone.

        weight <- t^beta2_decay
        row_var <- lerp(row_var, mean(g^2, dim=-1), weight)
        col_var <- lerp(col_var, mean(g^2, dim=-2), weight)
        second_moment <- row_var / max(mean(row_var, dim=-2), epsilon) col_var
        update <- g / sqrt(max(second_moment, epsilon^2))
        excess <- sqrt(mean(update^2)) / d
        rms <- sqrt(mean(p^2))
        step_size <- where(rms > eps.1, rms, eps.1) min(lr, 1 / sqrt(t))
        p <- p (1 - lr wd) - step_size / where(excess > 1, excess, 1) update

    A parameter with fewer than two dimensions has a second moment for each element.

        variance <- lerp(variance, g^2, t^beta2_decay)
        update <- g / sqrt(max(variance, epsilon^2))
        excess <- sqrt(mean(update^2)) / d
        rms <- sqrt(mean(p^2))
        step_size <- where(rms > eps.1, rms, eps.1) min(lr, 1 / sqrt(t))
        p <- p (1 - lr wd) - step_size / where(excess > 1, excess, 1) update

    Paper: Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost,
    arXiv:1804.04235.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the largest step, relative to the root mean square of the parameter
        beta2_decay: how fast the share fades that a new gradient has in the second moments
        eps: what second moments, and the size of a parameter, are at least; None for the first
            stands for epsilon: the distance from 1 to the next larger number of the dtype
        d: the largest root mean square of an update, before it is made relative
        weight_decay: the share of the parameter removed per unit of `lr`
        foreach: use the back-end that updates many tensors per call
        maximize: climb instead of descend
        fused: use the back-end that updates all tensors in one kernel

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([0.5])
    >>> Adafactor([weight], lr=0.1).step()  # a first step is lr times the size of the parameter
    >>> round(weight.item(), 4)
    0.9
    """

    lr: Rate = 1e-2
    beta2_decay: Power = -0.8
    eps: tuple[Epsilon1 | None, Epsilon2] = (None, 1e-3)
    d: Threshold = 1.0
    weight_decay: Shrinkage = 0.0
    _: KW_ONLY
    foreach: bool | None = None
    maximize: bool = False
    fused: OwnFlag = None

    row_var = zeros(over=-1)
    col_var = zeros(over=-2)
    variance = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        eps1, eps2 = group.eps
        if eps1 is None:
            eps1 = epsilon(param)
        weight = state.step**group.beta2_decay
        if param.ndim > 1:
            state.row_var = lerp(state.row_var, mean(grad * grad, dim=-1), weight)
            state.col_var = lerp(state.col_var, mean(grad * grad, dim=-2), weight)
            mean_var = maximum(mean(state.row_var, dim=-2), eps1)
            second_moment = state.row_var / mean_var * state.col_var
        else:
            second_moment = state.variance = lerp(state.variance, grad * grad, weight)

        update = grad / sqrt(maximum(second_moment, eps1 * eps1))
        # `where`, so that one NaN does not spread to all elements
        excess = sqrt(mean(update * update)) / group.d
        clipping = where(excess > 1, excess, 1.0)
        rms = sqrt(mean(param * param))
        size = where(rms > eps2, rms, eps2)
        step_size = size * minimum(group.lr, 1 / sqrt(state.step))
        return param * (1 - group.lr * group.weight_decay) - step_size / clipping * update
