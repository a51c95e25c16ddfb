"""Rules of a user's own, written outside the package: they prove that the language has the words.

Each follows its paper's algorithm, or says where it takes another way.
"""

from __future__ import annotations

from typing import Any

import stepwell
from stepwell.language import (
    Decay,
    NonNegative,
    Positive,
    Real,
    amax,
    atan2,
    clamp,
    full,
    lerp,
    maximum,
    mean,
    norm,
    sign,
    sqrt,
    unset,
    where,
    zeros,
)
from stepwell.language import sum as total


class Lion(stepwell.Optimizer):
    """Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675."""

    lr: NonNegative = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: NonNegative = 0.0

    exp_avg = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        beta1, beta2 = group.betas
        direction = sign(lerp(state.exp_avg, grad, 1 - beta1))
        state.exp_avg = lerp(state.exp_avg, grad, 1 - beta2)
        return param - group.lr * (direction + group.weight_decay * param)


def adam_direction(grad: Any, state: Any, group: Any) -> Any:
    """m / (sqrt(v) + eps), both without their bias."""
    beta1, beta2 = group.betas
    state.exp_avg = lerp(state.exp_avg, grad, 1 - beta1)
    state.exp_avg_sq = beta2 * state.exp_avg_sq + (1 - beta2) * grad * grad
    first = state.exp_avg / (1 - beta1**state.step)
    return first / (sqrt(state.exp_avg_sq / (1 - beta2**state.step)) + group.eps)


class LAMB(stepwell.Optimizer):
    """You et al., Large Batch Optimization for Deep Learning, arXiv:1904.00962."""

    lr: NonNegative = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: NonNegative = 1e-6
    weight_decay: NonNegative = 0.01

    exp_avg = zeros()
    exp_avg_sq = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        direction = adam_direction(grad, state, group) + group.weight_decay * param
        size, step_size = norm(param), norm(direction)
        trust = where((size > 0) & (step_size > 0), size / step_size, 1.0)
        return param - group.lr * trust * direction


class LARS(stepwell.Optimizer):
    """You et al., Large Batch Training of Convolutional Networks, arXiv:1708.03888."""

    lr: NonNegative = 0.1
    momentum: Decay = 0.9
    weight_decay: NonNegative = 1e-4
    trust: NonNegative = 1e-3

    momentum_buffer = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        size = norm(param)
        scale = norm(grad) + group.weight_decay * size
        rate = group.lr * where((size > 0) & (scale > 0), group.trust * size / scale, 1.0)
        direction = grad + group.weight_decay * param
        state.momentum_buffer = group.momentum * state.momentum_buffer + rate * direction
        return param - state.momentum_buffer


class AdaBelief(stepwell.Optimizer):
    """Zhuang et al., AdaBelief Optimizer, arXiv:2010.07468."""

    lr: NonNegative = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: NonNegative = 1e-8

    exp_avg = zeros()
    exp_avg_var = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        beta1, beta2 = group.betas
        state.exp_avg = lerp(state.exp_avg, grad, 1 - beta1)
        surprise = grad - state.exp_avg
        state.exp_avg_var = lerp(state.exp_avg_var, surprise**2, 1 - beta2) + group.eps
        spread = sqrt(state.exp_avg_var / (1 - beta2**state.step)) + group.eps
        return param - group.lr / (1 - beta1**state.step) * state.exp_avg / spread


class Yogi(stepwell.Optimizer):
    """Zaheer et al., Adaptive Methods for Nonconvex Optimization, NeurIPS 2018."""

    lr: NonNegative = 1e-2
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: NonNegative = 1e-3

    exp_avg = zeros()
    exp_avg_sq = full(1e-6)

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        beta1, beta2 = group.betas
        state.exp_avg = lerp(state.exp_avg, grad, 1 - beta1)
        old = state.exp_avg_sq
        state.exp_avg_sq = old - (1 - beta2) * sign(old - grad**2) * grad**2
        return param - group.lr * state.exp_avg / (sqrt(state.exp_avg_sq) + group.eps)


class Adan(stepwell.Optimizer):
    """Xie et al., Adaptive Nesterov Momentum Algorithm, arXiv:2208.06677."""

    lr: NonNegative = 1e-3
    betas: tuple[Decay, Decay, Decay] = (0.02, 0.08, 0.01)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.02

    exp_avg = unset()
    exp_avg_diff = zeros()
    exp_avg_sq = unset()
    previous_grad = unset()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        beta1, beta2, beta3 = group.betas
        if state.previous_grad is None:
            state.exp_avg, state.exp_avg_sq = grad, grad**2
        else:
            change = grad - state.previous_grad
            state.exp_avg = lerp(state.exp_avg, grad, beta1)
            state.exp_avg_diff = lerp(state.exp_avg_diff, change, beta2)
            ahead = grad + (1 - beta2) * change
            state.exp_avg_sq = lerp(state.exp_avg_sq, ahead**2, beta3)
        state.previous_grad = grad
        rate = group.lr / (sqrt(state.exp_avg_sq) + group.eps)
        new_param = param - rate * (state.exp_avg + (1 - beta2) * state.exp_avg_diff)
        return new_param / (1 + group.lr * group.weight_decay)


class ADOPT(stepwell.Optimizer):
    """Taniguchi et al., ADOPT: Modified Adam Can Converge with Any beta2, arXiv:2411.02853."""

    lr: NonNegative = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.9999)
    eps: Positive = 1e-6

    exp_avg = zeros()
    exp_avg_sq = unset()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        beta1, beta2 = group.betas
        before = state.step - 1
        if state.exp_avg_sq is None:
            state.exp_avg_sq = grad**2
            return param
        bound = before**0.25
        scaled = clamp(grad / maximum(sqrt(state.exp_avg_sq), group.eps), -bound, bound)
        state.exp_avg = lerp(state.exp_avg, scaled, 1 - beta1)
        state.exp_avg_sq = lerp(state.exp_avg_sq, grad**2, 1 - beta2)
        return param - group.lr * state.exp_avg


class Prodigy(stepwell.Optimizer):
    """Mishchenko and Defazio, Prodigy, arXiv:2306.06101: the version for Adam."""

    lr: NonNegative = 1.0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    d0: Positive = 1e-6

    exp_avg = zeros()
    exp_avg_sq = zeros()
    s = zeros()
    start = full("param")
    d = full("d0", scalar=True)
    numerator = zeros(scalar=True)

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        beta1, beta2 = group.betas
        d, root = state.d, sqrt(beta2)
        state.exp_avg = lerp(state.exp_avg, d * grad, 1 - beta1)
        state.exp_avg_sq = lerp(state.exp_avg_sq, (d * grad) ** 2, 1 - beta2)

        gained = total(grad * (state.start - param), across="group")
        state.numerator = root * state.numerator + (1 - root) * group.lr * d * d * gained
        state.s = root * state.s + (1 - root) * group.lr * d * d * grad
        distance = total(abs(state.s), across="group")
        state.d = where(distance > 0, maximum(d, state.numerator / distance), d)
        return param - group.lr * d * state.exp_avg / (sqrt(state.exp_avg_sq) + d * group.eps)


class MARS(stepwell.Optimizer):
    """Yuan et al., MARS: Unleashing the Power of Variance Reduction, arXiv:2411.10438 (AdamW)."""

    lr: NonNegative = 3e-3
    betas: tuple[Decay, Decay] = (0.95, 0.99)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.1
    gamma: NonNegative = 0.025

    exp_avg = zeros()
    exp_avg_sq = zeros()
    previous_grad = unset()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        beta1, _ = group.betas
        corrected = grad
        if state.previous_grad is not None:
            corrected = grad + group.gamma * beta1 / (1 - beta1) * (grad - state.previous_grad)
        state.previous_grad = grad
        corrected = corrected / maximum(norm(corrected), 1.0)
        direction = adam_direction(corrected, state, group)
        return param - group.lr * (direction + group.weight_decay * param)


class CautiousAdamW(stepwell.Optimizer):
    """Liang et al., Cautious Optimizers, arXiv:2411.16085, with the scale of the authors' code."""

    lr: NonNegative = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 1e-2

    exp_avg = zeros()
    exp_avg_sq = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        direction = adam_direction(grad, state, group)
        mask = where(direction * grad > 0, 1.0, 0.0)
        scale = 1 / clamp(mean(mask), 1e-3, 1.0)
        param = param * (1 - group.lr * group.weight_decay)
        return param - group.lr * scale * mask * direction


class Factored(stepwell.Optimizer):
    """Shazeer and Stern, Adafactor, arXiv:1804.04235, for matrices, with its relative steps."""

    lr: NonNegative = 1e-2
    beta2_decay: Real = -0.8
    eps1: NonNegative = 1e-30
    eps2: NonNegative = 1e-3
    threshold: Positive = 1.0

    row_var = zeros(over=-1)
    col_var = zeros(over=-2)

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        decay = 1 - state.step**group.beta2_decay
        squared = grad**2 + group.eps1
        state.row_var = lerp(state.row_var, mean(squared, dim=-1), 1 - decay)
        state.col_var = lerp(state.col_var, mean(squared, dim=-2), 1 - decay)
        variance = state.row_var * state.col_var / mean(state.row_var, dim=-2)
        direction = grad / sqrt(variance)
        direction = direction / maximum(sqrt(mean(direction**2)) / group.threshold, 1.0)
        step_size = group.lr * maximum(sqrt(mean(param**2)), group.eps2)
        return param - step_size * direction


class AdamAtan2(stepwell.Optimizer):
    """Everett et al., Scaling Exponents Across Parameterizations, arXiv:2407.05872."""

    lr: NonNegative = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)

    exp_avg = zeros()
    exp_avg_sq = zeros()

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        beta1, beta2 = group.betas
        state.exp_avg = lerp(state.exp_avg, grad, 1 - beta1)
        state.exp_avg_sq = lerp(state.exp_avg_sq, grad**2, 1 - beta2)
        first = state.exp_avg / (1 - beta1**state.step)
        second = sqrt(state.exp_avg_sq / (1 - beta2**state.step))
        return param - group.lr * 4 / 3.141592653589793 * atan2(first, second)


class SignedMax(stepwell.Optimizer):
    """No paper's: the largest gradient of the parameter sets the size of a signed step."""

    lr: NonNegative = 1e-2

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        return param - group.lr * amax(abs(grad)) * sign(grad)


RULES = (
    Lion,
    LAMB,
    LARS,
    AdaBelief,
    Yogi,
    Adan,
    ADOPT,
    Prodigy,
    MARS,
    CautiousAdamW,
    Factored,
    AdamAtan2,
    SignedMax,
)
