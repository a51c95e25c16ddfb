"""RMSprop: steps scaled by a running mean of the squared gradient."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

from ..formulas import l2
from ..language import NonNegative, OwnFlag, Switch, count, lerp, maximum, sqrt, zeros
from ..optimizer import Optimizer

__all__ = ["RMSprop"]


class RMSprop(Optimizer):
    """Steps scaled by a running mean of the squared gradient.

        g <- g + wd p
        v <- alpha v + (1 - alpha) g^2    (centered: less the square of the mean gradient, below)
        b <- mu b + g / (sqrt(v) + eps)
        p <- p - lr b

    Paper: Tieleman and Hinton, Lecture 6.5 of Neural Networks for Machine Learning, 2012.
    `centered`: Graves, Generating Sequences With Recurrent Neural Networks, arXiv:1308.0850.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the step size
        alpha: how much of the running mean of squares survives a step
        eps: keeps the denominator above zero
        weight_decay: the share of the parameter added to its gradient
        momentum: how much of the running sum of scaled gradients survives a step
        centered: scale by the variance of the gradient instead of its mean square
        capturable: keep step counts on the accelerator, so that a graph can hold the step
        foreach: use the back-end that updates many tensors per call
        maximize: climb instead of descend
        differentiable: let autograd through the step
        fused: use the back-end that updates all tensors in one kernel

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([0.5])
    >>> RMSprop([weight], lr=0.1, alpha=0.75).step()  # v = 0.25 * 0.25: 1 - 0.1 * 0.5 / 0.25
    >>> round(weight.item(), 4)
    0.8
    """

    lr: NonNegative = 1e-2
    alpha: NonNegative = 0.99
    eps: NonNegative = 1e-8
    weight_decay: Switch = 0
    momentum: Switch = 0
    centered: bool = False
    capturable: bool = False
    foreach: bool | None = None
    maximize: bool = False
    differentiable: bool = False
    _: KW_ONLY
    fused: OwnFlag = None

    step = count()
    square_avg = zeros()
    momentum_buffer = zeros(when="momentum")
    grad_avg = zeros(when="centered")

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        grad = l2(param, grad, group)
        state.square_avg = group.alpha * state.square_avg + (1 - group.alpha) * grad * grad
        second_moment = state.square_avg
        if group.centered:
            state.grad_avg = lerp(state.grad_avg, grad, 1 - group.alpha)
            # no variance is below zero but by rounding
            second_moment = maximum(second_moment - state.grad_avg * state.grad_avg, 0.0)
        scaled = grad / (sqrt(second_moment) + group.eps)
        if not group.momentum:
            return param - group.lr * scaled
        state.momentum_buffer = group.momentum * state.momentum_buffer + scaled
        return param - group.lr * state.momentum_buffer
