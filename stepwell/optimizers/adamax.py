"""Adamax: Adam with the largest gradient in place of the mean square."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

from ..formulas import l2
from ..language import Decay, NonNegative, OwnFlag, Switch, lerp, maximum, zeros
from ..optimizer import Optimizer

__all__ = ["Adamax"]


class Adamax(Optimizer):
    """Adam with the largest gradient, faded over time, in place of the mean square.

        g <- g + wd p
        m <- b1 m + (1 - b1) g
        u <- max(b2 u, |g| + eps)
        p <- p - lr / (1 - b1^t) m / u

    Paper: Kingma and Ba, Adam: A Method for Stochastic Optimization, arXiv:1412.6980.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the step size
        betas: how much of the running mean, and of the largest gradient, survives a step
        eps: keeps the denominator above zero
        weight_decay: the share of the parameter added to its gradient
        foreach: use the back-end that updates many tensors per call
        maximize: climb instead of descend
        differentiable: let autograd through the step
        capturable: keep step counts on the accelerator, so that a graph can hold the step
        fused: use the back-end that updates all tensors in one kernel

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([0.5])
    >>> Adamax([weight], lr=0.1).step()  # a first step has size lr
    >>> round(weight.item(), 4)
    0.9
    """

    lr: NonNegative = 2e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: Switch = 0
    foreach: bool | None = None
    _: KW_ONLY
    maximize: bool = False
    differentiable: bool = False
    capturable: bool = False
    fused: OwnFlag = None

    exp_avg = zeros()
    exp_inf = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        beta1, beta2 = group.betas
        grad = l2(param, grad, group)
        state.exp_avg = lerp(state.exp_avg, grad, 1 - beta1)
        state.exp_inf = maximum(beta2 * state.exp_inf, abs(grad) + group.eps)
        step_size = group.lr / (1 - beta1**state.step)
        return param - step_size * state.exp_avg / state.exp_inf
