"""Adagrad: steps that shrink with the sum of all squared gradients."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, ClassVar

from ..formulas import l2
from ..language import NonNegative, Switch, full, sqrt
from ..optimizer import Optimizer

__all__ = ["Adagrad"]


class Adagrad(Optimizer):
    """Steps that shrink with the sum of all squared gradients so far.

        g <- g + wd p
        sum <- sum + g^2
        p <- p - lr / (1 + (t - 1) lr_decay) g / (sqrt(sum) + eps)

    Paper: Duchi, Hazan and Singer, Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization, JMLR 12, 2011.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the step size
        lr_decay: how fast the step size fades
        weight_decay: the share of the parameter added to its gradient
        initial_accumulator_value: what the sum starts at
        eps: keeps the denominator above zero
        foreach: use the back-end that updates many tensors per call
        maximize: climb instead of descend
        differentiable: let autograd through the step
        fused: use the back-end that updates all tensors in one kernel

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([0.5])
    >>> Adagrad([weight], lr=0.1).step()  # a first step has size lr
    >>> round(weight.item(), 4)
    0.9
    """

    lr: NonNegative = 1e-2
    lr_decay: NonNegative = 0
    weight_decay: Switch = 0
    initial_accumulator_value: NonNegative = 0
    eps: NonNegative = 1e-10
    foreach: bool | None = None
    _: KW_ONLY
    maximize: bool = False
    differentiable: bool = False
    fused: bool | None = None

    sum = full("initial_accumulator_value")

    # with weight decay, what a sparse gradient leaves out still moves
    densify: ClassVar[bool] = True
    # as torch's, whose users look at it before the first step
    starts_with_state: ClassVar[bool] = True

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        grad = l2(param, grad, group)
        state.sum = state.sum + grad * grad
        step_size = group.lr / (1 + (state.step - 1) * group.lr_decay)
        return param - step_size * grad / (sqrt(state.sum) + group.eps)
