"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any

from ..formulas import adam, decay
from ..language import Decay, NonNegative, Switch, fixed, zeros
from ..optimizer import Optimizer

__all__ = ["AdamW"]


class AdamW(Optimizer):
    """Adam with decoupled weight decay.

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        p <- p (1 - lr wd) - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    Paper: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101.
    `amsgrad`: Reddi, Kale and Kumar, On the Convergence of Adam and Beyond, arXiv:1904.09237.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the step size
        betas: how much of each running mean survives a step
        eps: keeps the denominator above zero
        weight_decay: the share of the parameter removed per unit of `lr`
        amsgrad: divide by the largest v so far instead of the latest
        maximize: climb instead of descend
        foreach: use the back-end that updates many tensors per call
        capturable: keep step counts on the accelerator, so that a graph can hold the step
        differentiable: let autograd through the step
        fused: use the back-end that updates all tensors in one kernel

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([0.5])
    >>> AdamW([weight], lr=0.1).step()  # decay by 0.1 * 0.01, then a first step of size lr
    >>> weight.item()
    0.89900...
    """

    lr: NonNegative = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: Switch = 1e-2
    amsgrad: bool = False
    decoupled_weight_decay = fixed(True)

    exp_avg = zeros()
    exp_avg_sq = zeros()
    max_exp_avg_sq = zeros(when="amsgrad")

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        param, grad = decay(param, grad, group)
        return adam(param, grad, state, group, amsgrad=group.amsgrad)
