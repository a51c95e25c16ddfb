"""Pieces of formula that several rules share; each stands here once."""

from __future__ import annotations

from typing import Any

from .language import lerp, maximum, sqrt

__all__ = ["adam", "decay", "l2"]


def l2(param: Any, grad: Any, group: Any) -> Any:
    """Weight decay, through the gradient."""
    return grad + group.weight_decay * param if group.weight_decay else grad


def decay(param: Any, grad: Any, group: Any) -> tuple[Any, Any]:
    """Weight decay, through the gradient or, if decoupled, straight from the parameter."""
    if group.weight_decay and group.decoupled_weight_decay:
        return param * (1 - group.lr * group.weight_decay), grad
    return param, l2(param, grad, group)


def adam(
    param: Any,
    grad: Any,
    state: Any,
    group: Any,
    *,
    amsgrad: bool = False,
    corrects_eps: bool = False,
) -> Any:
    """One step of Adam without weight decay; `corrects_eps` adds eps before the correction."""
    beta1, beta2 = group.betas
    state.exp_avg = lerp(state.exp_avg, grad, 1 - beta1)
    state.exp_avg_sq = beta2 * state.exp_avg_sq + (1 - beta2) * grad * grad
    second_moment = state.exp_avg_sq
    if amsgrad:
        second_moment = state.max_exp_avg_sq = maximum(state.max_exp_avg_sq, second_moment)

    step_size = group.lr / (1 - beta1**state.step)
    denom = sqrt(second_moment) / sqrt(1 - beta2**state.step)
    denom += group.eps / sqrt(1 - beta2**state.step) if corrects_eps else group.eps
    return param - step_size * state.exp_avg / denom
