"""What comes before and after a rule in the same pass over memory.

A Transform declares hyperparameters and state as a rule does. It may change the gradient that
the rule sees (`before`) and the parameter that the rule returns (`after`); `compose` makes one
formula of the rule and its transforms, which is traced, and so fused, as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from .fields import Decay, Field, NonNegative, Positive, Real, Slot, fields_of, full, slots_of
from .functions import clamp, lerp, minimum, norm
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
    """Keep an exponential moving average of the parameter in its state."""

    average_decay: Decay = 0.999

    average = full("param")

    @staticmethod
    def after(param: Any, new_param: Any, state: Any, group: Any) -> Any:
        state.average = lerp(state.average, new_param, 1 - group.average_decay)
        return new_param


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
        slots |= transform.slots

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
