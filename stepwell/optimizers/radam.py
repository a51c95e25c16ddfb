"""RAdam: Adam that starts as momentum, until the mean square can be trusted."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

from ..formulas import decay
from ..language import Decay, NonNegative, OwnFlag, Switch, lerp, sqrt, where, zeros
from ..optimizer import Optimizer

__all__ = ["RAdam"]


class RAdam(Optimizer):
    """Adam that starts as momentum, until the running mean of squares can be trusted.

        g <- g + wd p    (decoupled_weight_decay: p <- p (1 - lr wd) instead)
        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        fade <- b2^t
        length_limit <- 2 / (1 - b2) - 1
        length <- length_limit - 2 t fade / (1 - fade)
        full <- (length_limit - 4) (length_limit - 2) / length_limit
        adapted <- sqrt((length - 4) (length - 2) / length / full (1 - fade)) / (sqrt(v) + eps)
        p <- p - lr / (1 - b1^t) m where(length > 5, adapted, 1)

    Paper: Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, arXiv:1908.03265.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the step size
        betas: how much of each running mean survives a step
        eps: keeps the denominator above zero
        weight_decay: the share of the parameter added to its gradient
        decoupled_weight_decay: take the weight decay off the parameter, as AdamW does
        foreach: use the back-end that updates many tensors per call
        maximize: climb instead of descend
        capturable: keep step counts on the accelerator, so that a graph can hold the step
        differentiable: let autograd through the step
        fused: use the back-end that updates all tensors in one kernel

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([0.5])
    >>> RAdam([weight], lr=0.1).step()  # not to be trusted yet: 1 - 0.1 * 0.5
    >>> round(weight.item(), 4)
    0.95
    """

    lr: NonNegative = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: Switch = 0
    decoupled_weight_decay: bool = False
    _: KW_ONLY
    foreach: bool | None = None
    maximize: bool = False
    capturable: bool = False
    differentiable: bool = False
    fused: OwnFlag = None

    exp_avg = zeros()
    exp_avg_sq = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        beta1, beta2 = group.betas
        param, grad = decay(param, grad, group)
        state.exp_avg = lerp(state.exp_avg, grad, 1 - beta1)
        state.exp_avg_sq = beta2 * state.exp_avg_sq + (1 - beta2) * grad * grad

        fade = beta2**state.step
        length_limit = 2 / (1 - beta2) - 1
        length = length_limit - 2 * state.step * fade / (1 - fade)
        rectified = (length - 4) * (length - 2) / length
        full = (length_limit - 4) * (length_limit - 2) / length_limit
        adapted = sqrt(rectified / full * (1 - fade)) / (sqrt(state.exp_avg_sq) + group.eps)
        step_size = group.lr / (1 - beta1**state.step)
        return param - step_size * state.exp_avg * where(length > 5, adapted, 1.0)
