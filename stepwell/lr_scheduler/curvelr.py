"""CurveLR: a curve that drives the rates of an optimizer.

A rate that nobody else touches is the closed form at every step: it does not drift, and the step
count alone gives the same bits. A rate that was changed by hand, or that a second schedule works on
too, is moved by the ratio of the curve's values at two neighbouring steps, as torch's chained form
does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..language.fields import Field
from .curves import Curve
from .hyperparameters import Floats, Groups, Number, holds_tensors, read
from .scheduler import LRScheduler
from .watch import copied, has_trained, loads

Floors = Sequence[Number] | None

C = TypeVar("C", bound=Curve)

# how far torch's chained products may have drifted from the closed form, relative to the rate
DRIFT = 1e-9
DRIFT_TENSOR = 1e-6


class CurveLR(LRScheduler):
    """A schedule that leads each rate from its initial value towards a floor, along a curve.

        rate(t) = floor + (initial rate - floor) curve(t)

    A subclass stores its arguments under torch's names, checks them by `fields`, and makes its
    `curve` of them. One whose rates torch computes anew at every step, whatever somebody has made
    of them, says `chains = False`.

    Args:
        optimizer: whose rates it sets
        last_epoch: the last step already taken; -1 starts anew
    """

    fields: ClassVar[tuple[Field, ...]] = ()
    chains: ClassVar[bool] = True
    unsaved = LRScheduler.unsaved | {"_stands", "_closed"}

    _stands: tuple[Any, ...] | None = None
    _closed: list[Number] | None = None

    @property
    def curve(self) -> Curve:
        """The curve of its present arguments."""
        raise NotImplementedError

    def _floors(self, groups: Groups) -> list[Number] | None:
        """The rates that these groups reach where the curve is zero; None: zero."""
        return None

    @property
    def is_factor(self) -> bool:
        """Whether all it does is to multiply rates."""
        return self.chains and self._floors(self.optimizer.param_groups) is None

    def get_lr(self) -> list[Number]:
        """The rates of the groups at `last_epoch`; for the latest ones call `get_last_lr`."""
        self._warn_outside_of_step()
        curve, step = self.curve, self.last_epoch
        groups = self.optimizer.param_groups
        floors = self._floors(groups)
        if not self.chains:
            return along(self.base_lrs, floors, curve(step))
        held = read(groups, "lr")
        if self._is_untouched(held, (curve, list(self.base_lrs), floors, step)):
            self._closed = along(self.base_lrs, floors, curve(step))
            return self._closed
        before = curve(step - 1) if step > 0 else 1.0
        move = start_of(self.optimizer) if self._is_initial and step > 0 else moved
        rates = move(held, self.base_lrs, floors, before, curve(step))
        if type(rates) is Floats:
            rates = self._closed = list(rates)
        return rates

    def _next_values(self) -> dict[str, list[Number]]:
        rates = self.get_lr()
        return {"lr": Floats(rates) if rates is self._closed else rates}

    def _is_untouched(self, held: list[Any], stands: tuple[Any, ...]) -> bool:
        """Whether the closed form was written one step ago, and nothing has changed since.

        `moved` would say the same, after it has computed the rates of that step anew.
        """
        stood, self._stands = self._stands, stands
        return (
            self._written is not None
            and self._written is self._last_lr
            and held == self._last_lr
            and stood is not None
            and stood == (*stands[:-1], stands[-1] - 1)
        )

    def _get_closed_form_lr(self) -> list[Number]:
        return self._values_at(self.last_epoch)["lr"]

    def _values_at(self, step: int) -> dict[str, list[Number]]:
        floors = self._floors(self.optimizer.param_groups)
        return {"lr": along(self.base_lrs, floors, self.curve(step))}

    def _value_now(self) -> float:
        """The value of the curve at the step where the rates stand."""
        return self.curve(max(self.last_epoch, 0))

    def _initial_of(self, group: dict[str, Any]) -> Number:
        [floor] = self._floors([group]) or [0.0]
        others = read(self.optimizer.param_groups[: len(self.base_lrs)], "lr")
        return started_at(group["lr"], floor, self._value_now(), others)

    def _check_arguments(self, state: Mapping[str, Any]) -> None:
        for field in self.fields:
            if field.name in state:
                field.check(state[field.name], type(self).__name__)


def along(bases: Sequence[Number], floors: Floors, value: float) -> list[Number]:
    """The closed form: from the floors to the initial rates as the value goes from 0 to 1."""
    if floors is None:
        return [base * value for base in bases]
    rest = 1.0 - value
    return [base * value + floor * rest for base, floor in zip(bases, floors, strict=True)]


def started_at(rate: Number, floor: Number, value: float, others: Sequence[Number]) -> Number:
    """The initial rate of a group that joins others where the curve has this value.

    The group keeps its proportion to them, also where the curve begins anew. A rate that is above
    all others is an initial one already: near the end of a curve, its quotient would be huge.
    """
    if not value or rate < floor or is_above(rate, others):
        return rate
    return floor + (rate - floor) / value


def is_above(rate: Number, others: Sequence[Number]) -> bool:
    """Return whether a rate is higher than all others."""
    return not any(rate <= other for other in others)


@lru_cache(maxsize=256)
def _remade(make: Callable[..., Curve], *arguments: Any) -> Curve:
    return make(*arguments)


def remade(make: Callable[..., C], *arguments: Any) -> C:
    """A curve of these arguments, which are checked when they are new."""
    return cast(C, _remade(make, *arguments))


def moved(
    held: Sequence[Number],
    bases: Sequence[Number],
    floors: Floors,
    before: float,
    after: float,
) -> list[Number]:
    """The rates after a step along which the curve goes from `before` to `after`."""
    expected = along(bases, floors, before)
    closed = along(bases, floors, after)
    # a look at the numbers of Tensors would wait for an accelerator
    if not holds_tensors(held) and held == expected:
        return closed if holds_tensors(closed) else Floats(closed)
    chained = [
        _chained(rate, base, floor, before, after)
        for rate, base, floor in zip(held, bases, floors or [0.0] * len(bases), strict=True)
    ]
    untouched = map(_is_near, held, expected, bases)
    return list(map(_choose, untouched, closed, chained))


def start_of(optimizer: Optimizer) -> Callable[..., list[Number]]:
    """Return how the rates of an optimizer get to the later step at which a schedule begins."""
    return partial(resumed, is_fresh=not (loads(optimizer) or has_trained(optimizer)))


def resumed(
    held: Sequence[Number],
    bases: Sequence[Number],
    floors: Floors,
    before: float,
    after: float,
    is_fresh: bool,
) -> list[Number]:
    """The rates where a schedule begins at a later step.

    They are the closed form there, whether the groups hold it already, or the one of the step
    before, or, if the optimizer is fresh, still their initial rates. Anything else was loaded or
    set on purpose, and is kept.
    """
    closed = along(bases, floors, after)
    rates: list[Number] = [copied(rate) for rate in held]
    for known in (along(bases, floors, before), closed, *([bases] if is_fresh else [])):
        untouched = map(_is_near, held, known, bases)
        rates = list(map(_choose, untouched, closed, rates))
    return rates


def _chained(rate: Number, base: Number, floor: Number, before: float, after: float) -> Number:
    if before:
        new = floor + (rate - floor) * (after / before)
    else:
        # zero has no ratio
        new = rate + (base - floor) * (after - before)
    # one that another schedule has led below the floor is not led further away from it
    return _at_least(new, (rate, floor, base))


def _at_least(rate: Number, bounds: Sequence[Number]) -> Number:
    """The rate, or the lowest of the bounds, if that is higher."""
    if isinstance(rate, Tensor):
        known = [torch.as_tensor(b, dtype=rate.dtype, device=rate.device) for b in bounds]
        return torch.maximum(rate, torch.stack([b.reshape(()) for b in known]).min())
    return max(rate, min(bounds))


def _is_near(rate: Number, expected: Number, base: Number) -> Any:
    """Whether the rate is what was expected: as a flag on the device for a Tensor."""
    if isinstance(rate, Tensor):
        expected = torch.as_tensor(expected, dtype=rate.dtype, device=rate.device)
        return torch.isclose(rate, expected, rtol=DRIFT_TENSOR, atol=0.0)
    return math.isclose(rate, expected, rel_tol=DRIFT, abs_tol=1e-12 * abs(float(base)))


def _choose(condition: Any, value: Number, otherwise: Number) -> Number:
    if isinstance(condition, Tensor):
        return torch.where(condition, value, otherwise).detach()
    return value if condition else otherwise
