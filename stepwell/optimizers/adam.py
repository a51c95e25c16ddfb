"""Adam: steps scaled by running means of the gradient and of its square."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

from ..formulas import adam, decay
from ..language import Decay, NonNegative, Switch, zeros
from ..optimizer import Optimizer

__all__ = ["Adam"]


class Adam(Optimizer):
    """Steps scaled by running means of the gradient and of its square.

        g <- g + wd p    (decoupled_weight_decay: p <- p (1 - lr wd) instead)
        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        p <- p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    Paper: Kingma and Ba, Adam: A Method for Stochastic Optimization, arXiv:1412.6980.
    `amsgrad`: Reddi, Kale and Kumar, On the Convergence of Adam and Beyond, arXiv:1904.09237.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the step size
        betas: how much of each running mean survives a step
        eps: keeps the denominator above zero
        weight_decay: the share of the parameter added to its gradient
        amsgrad: divide by the largest v so far instead of the latest
        foreach: use the back-end that updates many tensors per call
        maximize: climb instead of descend
        capturable: keep step counts on the accelerator, so that a graph can hold the step
        differentiable: let autograd through the step
        fused: use the back-end that updates all tensors in one kernel
        decoupled_weight_decay: take the weight decay off the parameter, as AdamW does

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([0.5])
    >>> Adam([weight], lr=0.1).step()  # a first step has size lr
    >>> weight.item()
    0.90000...
    """

    lr: NonNegative = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: Switch = 0
    amsgrad: bool = False
    _: KW_ONLY
    foreach: bool | None = None
    maximize: bool = False
    capturable: bool = False
    differentiable: bool = False
    fused: bool | None = None
    decoupled_weight_decay: bool = False

    exp_avg = zeros()
    exp_avg_sq = zeros()
    max_exp_avg_sq = zeros(when="amsgrad")

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        param, grad = decay(param, grad, group)
        return adam(param, grad, state, group, amsgrad=group.amsgrad)
