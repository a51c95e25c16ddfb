"""ChainedScheduler: several schedules at once, whose factors multiply."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

from torch.optim import Optimizer

from ..compiling import skipped
from .composite import Composite, common_optimizer, follow, start_anew, take
from .curvelr import CurveLR, is_above, moved
from .curves import Curve
from .hyperparameters import Groups, Number, read, write
from .watch import check_order, copied, move_on, watch


class ChainedScheduler(Composite):
    """Steps several schedules, one after the other, at every step.

    The rates are the initial ones times the product of all factors; for curves, `first * second`
    says the same. Schedules that set rates anew, such as `LambdaLR`, come first.

    Args:
        schedulers: in the order in which they step
        optimizer: whose rates they set; None: that of the first of them

    >>> from stepwell.lr_scheduler import ConstantLR, ExponentialLR
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> parts = [ConstantLR(optimizer, 0.5, total_iters=2), ExponentialLR(optimizer, gamma=0.5)]
    >>> ChainedScheduler(parts).preview(4)
    [[0.5], [0.25], [0.25], [0.125]]
    """

    def __init__(self, schedulers: Sequence[Any], optimizer: Optimizer | None = None) -> None:
        owner = type(self).__name__
        optimizer = common_optimizer(schedulers, optimizer, owner, " to be chained")
        watch(optimizer)
        self._schedulers = list(schedulers)
        self.optimizer = optimizer
        self._last_lr = self._rates_now()

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """The step at which the first part stands."""
        return int(self._schedulers[0].last_epoch)

    @skipped
    def step(self) -> None:  # type: ignore[override]
        """Move on by one step, after the optimizer's own `step`."""
        curve = self._curve()
        self._follow_groups()
        if curve is None:
            for part in self._schedulers:
                part.step()
        else:
            self._step_along(curve)
        self._last_lr = self._rates_now()

    def _curve(self) -> Curve | None:
        """The product of the parts, if all of them are factors and stand at one step."""
        parts = self._schedulers
        if not all(isinstance(part, CurveLR) and part.is_factor for part in parts):
            return None
        if len({part.last_epoch for part in parts}) > 1:
            return None
        curves: list[Curve] = [part.curve for part in parts]
        return reduce(operator.mul, curves)

    def _step_along(self, curve: Curve) -> None:
        first, groups = self._schedulers[0], self.optimizer.param_groups
        if first._step_count == 1:
            check_order(self.optimizer)
        step = first.last_epoch + 1
        held = read(groups, "lr")
        write(groups, {"lr": moved(held, first.base_lrs, None, curve(step - 1), curve(step))})
        rates = self._rates_now()
        for part in self._schedulers:
            part.last_epoch = step
            part._step_count += 1
            part._last_lr = list(rates)
        move_on(self.optimizer)

    def _follow_groups(self) -> Groups:
        groups, known = self.optimizer.param_groups, len(self._last_lr)
        joined = groups[known:]
        others = read(groups[:known], "lr") if joined else []
        for group in joined:
            if "initial_lr" not in group:
                # each of the parts would take all of the rate for its own
                first, share = self._share(group)
                if first is None or is_above(group["lr"], others):
                    group["initial_lr"] = copied(group["lr"])
                else:
                    group["initial_lr"] = first["initial_lr"] * share
        for part in self._schedulers:
            follow(part)
        return groups

    def _initial_step(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        for part in self._schedulers:
            start_anew(part)
        self._last_lr = self._rates_now()

    def _names(self) -> tuple[str, ...]:
        names = [name for part in self._schedulers for name in getattr(part, "_names", tuple)()]
        return tuple(dict.fromkeys(("lr", *names)))

    def _values_at(self, step: int) -> dict[str, list[Number]]:
        curve = self._curve()
        if curve is None:
            return super()._values_at(step)
        value = curve(step)
        return {"lr": [base * value for base in self._schedulers[0].base_lrs]}

    def _take_state(self, state: dict[str, Any]) -> None:
        parts = state.pop("_schedulers", None)
        step = state.pop("last_epoch", None)
        vars(self).update(state)
        for index, part in enumerate(self._schedulers):
            if parts is not None:
                take(part, parts[index])
            elif step is not None:
                take(part, {"last_epoch": step})
