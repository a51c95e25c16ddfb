"""Adadelta: steps as large as the running mean of the steps before."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

from ..formulas import l2
from ..language import NonNegative, OwnFlag, Share, Switch, count, sqrt, zeros
from ..optimizer import Optimizer

__all__ = ["Adadelta"]


class Adadelta(Optimizer):
    """Steps as large as the running mean of the steps before.

        g <- g + wd p
        v <- rho v + (1 - rho) g^2
        delta <- sqrt(u + eps) / sqrt(v + eps) g
        u <- rho u + (1 - rho) delta^2
        p <- p - lr delta

    Paper: Zeiler, ADADELTA: An Adaptive Learning Rate Method, arXiv:1212.5701.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the share of a step that is taken
        rho: how much of each running mean survives a step
        eps: lets the first step be more than zero
        weight_decay: the share of the parameter added to its gradient
        foreach: use the back-end that updates many tensors per call
        capturable: keep step counts on the accelerator, so that a graph can hold the step
        maximize: climb instead of descend
        differentiable: let autograd through the step
        fused: use the back-end that updates all tensors in one kernel

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([1.0])
    >>> Adadelta([weight], rho=0.0, eps=0.25).step()  # 1 - sqrt(0.25) / sqrt(1 + 0.25)
    >>> round(weight.item(), 4)
    0.5528
    """

    lr: NonNegative = 1.0
    rho: Share = 0.9
    eps: NonNegative = 1e-6
    weight_decay: Switch = 0
    foreach: bool | None = None
    _: KW_ONLY
    capturable: bool = False
    maximize: bool = False
    differentiable: bool = False
    fused: OwnFlag = None

    step = count()
    square_avg = zeros()
    acc_delta = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        grad = l2(param, grad, group)
        state.square_avg = group.rho * state.square_avg + (1 - group.rho) * grad * grad
        delta = sqrt(state.acc_delta + group.eps) / sqrt(state.square_avg + group.eps) * grad
        state.acc_delta = group.rho * state.acc_delta + (1 - group.rho) * delta * delta
        return param - group.lr * delta
