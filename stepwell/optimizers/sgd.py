"""SGD: stochastic gradient descent, with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any, ClassVar

from ..formulas import l2
from ..language import NonNegative, Real, Switch, unset
from ..optimizer import Optimizer

__all__ = ["SGD"]


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum if it is not zero.

        b <- mu b + (1 - tau) (g + wd p)    (the first b is g + wd p)
        p <- p - lr b                       (nesterov: p - lr (g + wd p + mu b))

    Paper: Sutskever et al., On the importance of initialization and momentum in deep learning,
    ICML 2013.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the step size
        momentum: how much of the running sum of gradients survives a step
        dampening: the share of a new gradient that is left out of that sum
        weight_decay: the share of the parameter added to its gradient
        nesterov: look one step of momentum ahead
        maximize: climb instead of descend
        foreach: use the back-end that updates many tensors per call
        differentiable: let autograd through the step
        fused: use the back-end that updates all tensors in one kernel

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([0.5])
    >>> optimizer = SGD([weight], lr=0.1, momentum=0.9)
    >>> optimizer.step()  # 1 - 0.1 * 0.5
    >>> optimizer.step()  # the momentum is 0.9 * 0.5 + 0.5 by now: 0.95 - 0.1 * 0.95
    >>> round(weight.item(), 4)
    0.855
    """

    lr: NonNegative = 1e-3
    momentum: Switch = 0
    dampening: Real = 0
    weight_decay: Switch = 0
    nesterov: bool = False
    _: KW_ONLY
    maximize: bool = False
    foreach: bool | None = None
    differentiable: bool = False
    fused: bool | None = None

    momentum_buffer = unset(when="momentum")

    # what a sparse gradient leaves out still moves with the momentum
    densify: ClassVar[bool] = True

    @staticmethod
    def check(group: Mapping[str, Any]) -> str | None:
        """Momentum that looks ahead must be there, and undamped."""
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            return "Nesterov momentum requires a momentum and zero dampening"
        return None

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        grad = l2(param, grad, group)
        if not group.momentum:
            return param - group.lr * grad

        if state.momentum_buffer is None:
            state.momentum_buffer = grad
        else:
            state.momentum_buffer = (
                group.momentum * state.momentum_buffer + (1 - group.dampening) * grad
            )
        if group.nesterov:
            return param - group.lr * (grad + group.momentum * state.momentum_buffer)
        return param - group.lr * state.momentum_buffer
