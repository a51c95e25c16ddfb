"""ASGD: stochastic gradient descent whose iterates are averaged."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

from ..formulas import l2
from ..language import NonNegative, OwnFlag, Real, Switch, full, lerp, maximum, where, zeros
from ..optimizer import Optimizer

__all__ = ["ASGD"]


class ASGD(Optimizer):
    """Stochastic gradient descent with a fading rate, whose iterates are averaged in `ax`.

        p <- p (1 - lambd eta) - eta (g + wd p)
        ax <- where(mu = 1, p, lerp(ax, p, mu))
        eta <- lr / (1 + lambd lr t)^alpha
        mu <- 1 / max(1, t - t0)

    Paper: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, SIAM Journal
    on Control and Optimization 30(4), 1992.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the step size at the start
        lambd: how fast parameters and step size fade
        alpha: the power with which the step size fades
        t0: the step at which averaging starts
        weight_decay: the share of the parameter added to its gradient
        foreach: use the back-end that updates many tensors per call
        maximize: climb instead of descend
        differentiable: let autograd through the step
        capturable: keep step counts on the accelerator, so that a graph can hold the step
        fused: use the back-end that updates all tensors in one kernel

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([0.5])
    >>> ASGD([weight], lr=0.1, lambd=0.5).step()  # 1 - 0.1 * 0.5 * 1 - 0.1 * 0.5
    >>> round(weight.item(), 4)
    0.9
    """

    lr: NonNegative = 1e-2
    lambd: NonNegative = 1e-4
    alpha: NonNegative = 0.75
    t0: Real = 1e6
    weight_decay: Switch = 0
    foreach: bool | None = None
    maximize: bool = False
    differentiable: bool = False
    capturable: bool = False
    _: KW_ONLY
    fused: OwnFlag = None

    eta = full("lr", scalar=True)
    mu = full(1.0, scalar=True)
    ax = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        grad = l2(param, grad, group)
        param = param * (1 - group.lambd * state.eta) - state.eta * grad
        state.ax = where(state.mu == 1, param, lerp(state.ax, param, state.mu))
        state.eta = group.lr / (1 + group.lambd * group.lr * state.step) ** group.alpha
        state.mu = 1 / maximum(1.0, state.step - group.t0)
        return param
