"""NAdam: Adam that looks one step of momentum ahead."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

from ..formulas import decay
from ..language import Decay, NonNegative, OwnFlag, Switch, full, lerp, sqrt, zeros
from ..optimizer import Optimizer

__all__ = ["NAdam"]


class NAdam(Optimizer):
    """Adam that looks one step of momentum ahead.

        g <- g + wd p    (decoupled_weight_decay: p <- p (1 - lr wd) instead)
        mu <- b1 (1 - 0.5 0.96^(t momentum_decay))
        mu_next <- b1 (1 - 0.5 0.96^((t + 1) momentum_decay))
        mu_product <- mu_product mu
        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        denom <- sqrt(v) / sqrt(1 - b2^t) + eps
        momentum_size <- lr mu_next / (1 - mu_product mu_next)
        p <- p - (lr (1 - mu) / (1 - mu_product) g + momentum_size m) / denom

    Paper: Dozat, Incorporating Nesterov Momentum into Adam, ICLR workshop 2016.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the step size
        betas: how much of each running mean survives a step
        eps: keeps the denominator above zero
        weight_decay: the share of the parameter added to its gradient
        momentum_decay: how fast the momentum grows to its full size, psi
        decoupled_weight_decay: take the weight decay off the parameter, as AdamW does
        foreach: use the back-end that updates many tensors per call
        maximize: climb instead of descend
        capturable: keep step counts on the accelerator, so that a graph can hold the step
        differentiable: let autograd through the step
        fused: use the back-end that updates all tensors in one kernel

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([0.5])
    >>> NAdam([weight], lr=0.1, betas=(0.0, 0.5)).step()  # no momentum: a first step of size lr
    >>> round(weight.item(), 4)
    0.9
    """

    lr: NonNegative = 2e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: Switch = 0
    momentum_decay: NonNegative = 4e-3
    decoupled_weight_decay: bool = False
    _: KW_ONLY
    foreach: bool | None = None
    maximize: bool = False
    capturable: bool = False
    differentiable: bool = False
    fused: OwnFlag = None

    mu_product = full(1.0, scalar=True)
    exp_avg = zeros()
    exp_avg_sq = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        beta1, beta2 = group.betas
        param, grad = decay(param, grad, group)

        mu = beta1 * (1 - 0.5 * 0.96 ** (state.step * group.momentum_decay))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((state.step + 1) * group.momentum_decay))
        state.mu_product = state.mu_product * mu

        state.exp_avg = lerp(state.exp_avg, grad, 1 - beta1)
        state.exp_avg_sq = beta2 * state.exp_avg_sq + (1 - beta2) * grad * grad
        denom = sqrt(state.exp_avg_sq) / sqrt(1 - beta2**state.step) + group.eps
        grad_size = group.lr * (1 - mu) / (1 - state.mu_product)
        momentum_size = group.lr * mu_next / (1 - state.mu_product * mu_next)
        return param - (grad_size * grad + momentum_size * state.exp_avg) / denom
