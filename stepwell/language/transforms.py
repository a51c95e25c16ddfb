"""What comes before and after a rule in the same pass over memory.

A Transform declares hyperparameters and state as a rule does. It may change the gradient that
the rule sees (`before`) and the parameter that the rule returns (`after`); `compose` makes one
formula of the rule and its transforms, which is traced, and so fused, as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from .fields import (
    Field,
    NonNegative,
    Positive,
    Range,
    Real,
    Share,
    Slot,
    Switch,
    fields_of,
    full,
    slots_of,
    zeros,
)
from .functions import clamp, floor, lerp, maximum, minimum, norm, where
from .program import Formula

__all__ = [
    "L2",
    "Average",
    "ClipNorm",
    "ClipValue",
    "DecoupledDecay",
    "Maximize",
    "Scale",
    "Transform",
    "Unscale",
    "compose",
]


class Transform:
    """One step before or after a rule; override `before`, `after` or both."""

    fields: ClassVar[dict[str, Field]] = {}
    slots: ClassVar[dict[str, Slot]] = {}

    def __init_subclass__(cls) -> None:
        cls.fields = fields_of(cls)
        cls.slots = slots_of(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        takes = ", ".join(f"{field}=..." for field in self.fields) or "none"
        raise TypeError(
            f"{name} is a class to compose a rule with: Composed = compose(AdamW, {name}); its "
            f"hyperparameters are those of the optimizer that Composed(params, ...) makes ({takes})"
        )

    @staticmethod
    def before(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The gradient that the rule, and what comes between, works with."""
        return grad

    @staticmethod
    def after(param: Any, new_param: Any, state: Any, group: Any) -> Any:
        """The new parameter, given the old one and what the rule made of it."""
        return new_param


class Unscale(Transform):
    """Undo a loss scaler's factor, in the gradient too, where a scaler is at work."""

    grad_scale: Real | None = None

    @staticmethod
    def before(param: Any, grad: Any, state: Any, group: Any) -> Any:
        if group.grad_scale is None:
            return grad
        state.grad = grad * (1 / group.grad_scale)
        return state.grad


class Maximize(Transform):
    """Climb instead of descend."""

    @staticmethod
    def before(param: Any, grad: Any, state: Any, group: Any) -> Any:
        return -grad if group.maximize else grad


class Scale(Transform):
    """Multiply the gradient by a number."""

    grad_factor: NonNegative = 1.0

    @staticmethod
    def before(param: Any, grad: Any, state: Any, group: Any) -> Any:
        return grad * group.grad_factor


class ClipValue(Transform):
    """Hold each element of the gradient between -clip_value and clip_value."""

    clip_value: Positive = 1.0

    @staticmethod
    def before(param: Any, grad: Any, state: Any, group: Any) -> Any:
        return clamp(grad, -group.clip_value, group.clip_value)


class ClipNorm(Transform):
    """Scale the gradients of all parameters together, so that their norm is at most max_norm.

    As torch.nn.utils.clip_grad_norm_, with its 1e-6 in the denominator.
    """

    max_norm: Positive = 1.0

    @staticmethod
    def before(param: Any, grad: Any, state: Any, group: Any) -> Any:
        return grad * minimum(group.max_norm / (norm(grad, across="all") + 1e-6), 1.0)


class L2(Transform):
    """Add a share of the parameter to its gradient."""

    l2: NonNegative = 0.0

    @staticmethod
    def before(param: Any, grad: Any, state: Any, group: Any) -> Any:
        return grad + group.l2 * param


class DecoupledDecay(Transform):
    """Shrink the parameter by a share that does not pass through the rule.

    Loshchilov and Hutter, arXiv:1711.05101.
    """

    decoupled_decay: NonNegative = 0.0

    @staticmethod
    def after(param: Any, new_param: Any, state: Any, group: Any) -> Any:
        return new_param - group.lr * group.decoupled_decay * param


class Average(Transform):
    """Keep an average of the parameter in its state.

        average <- average + weight (p - average)

    The first weight is 1, so that an average begins as a copy, as torch's `AveragedModel` does.
    From then on it is `1 - average_decay`, and with `average_warmup` w, after n averages, at least
    w / (n + w). The decay then rises as n / (n + w): with w = 9 as (1 + t) / (10 + t), where t
    begins with the second average, which is how TensorFlow's `ExponentialMovingAverage` warms up
    (https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage); with w = 1 and
    `average_decay=1` all weights count the same, as in Izmailov et al., Averaging Weights Leads to
    Wider Optima and Better Generalization, arXiv:1803.05407.

    Averages are taken from step `average_start` + 1 on, at every `average_every`-th step; before,
    the average is the parameter. It is kept in float32 for parameters in half precision, which
    could not hold what a single step adds.
    """

    average_decay: Share = 0.999
    average_warmup: Switch = 0
    average_start: Annotated[int, Range(0)] = 0
    average_every: Annotated[int, Range(1)] = 1

    average = full("param", wide=True)
    n_averaged = zeros(scalar=True)

    @staticmethod
    def after(param: Any, new_param: Any, state: Any, group: Any) -> Any:
        weight = 1 - group.average_decay
        if group.average_warmup:
            warmup = group.average_warmup
            weight = maximum(weight, warmup / (state.n_averaged + warmup))
        average, taken = lerp(state.average, new_param, weight), 1.0
        if group.average_start or group.average_every > 1:
            is_due = _is_due(state.step - 1 - group.average_start, group.average_every)
            average, taken = where(is_due, average, state.average), where(is_due, 1.0, 0.0)
        state.average = where(state.n_averaged > 0, average, new_param)
        state.n_averaged = state.n_averaged + taken
        return new_param


def _is_due(since: Any, every: int) -> Any:
    """Whether a multiple of `every` steps has passed since the start, none included."""
    return (since >= 0) & (floor(since / every) * every == since)


def compose(rule: Formula, transforms: Sequence[type[Transform]]) -> Formula:
    """The rule with its transforms, the first of them outermost, as one formula.

    Raises:
        TypeError: two of them declare the same hyperparameter or state
    """
    fields, slots = dict(rule.fields), dict(rule.slots)
    for transform in transforms:
        for name in (*transform.fields, *transform.slots):
            if name in fields or name in slots:
                raise TypeError(f"{transform.__name__}: {rule.name} has a {name!r} already")
        fields |= transform.fields
        slots |= {name: replace(slot, added=True) for name, slot in transform.slots.items()}

    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        if "step" in rule.slots:
            # to look at the count is to advance it
            _ = state.step
        for transform in transforms:
            grad = transform.before(param, grad, state, group)
        new_param = rule.update(param, grad, state, group)
        for transform in reversed(transforms):
            new_param = transform.after(param, new_param, state, group)
        return new_param

    return Formula(rule.name, fields, slots, update)
