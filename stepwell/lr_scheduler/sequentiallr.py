"""SequentialLR: one schedule after the other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from ..compiling import skipped
from .composite import Composite, common_optimizer, follow, start_anew, take, values_at
from .curves.composition import active, whole
from .curves.multi_step import ascending, require_many
from .hyperparameters import Groups, Number, write
from .scheduler import LAST_EPOCH, LRScheduler
from .watch import copied, settle, watch


class SequentialLR(Composite):
    """Lets one schedule after the other set the rates, each from its own step 0 on.

    For curves, `first >> second` says the same.

    Args:
        optimizer: whose rates they set
        schedulers: one after the other
        milestones: the steps at which the second, the third ... begin, in ascending order
        last_epoch: the last step already taken; -1 starts anew

    >>> from stepwell.lr_scheduler import ConstantLR, ExponentialLR
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> parts = [ConstantLR(optimizer, factor=0.25), ExponentialLR(optimizer, gamma=0.5)]
    >>> SequentialLR(optimizer, parts, milestones=[2]).preview(5)
    [[0.25], [0.25], [1.0], [0.5], [0.25]]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[Any],
        milestones: list[int],
        last_epoch: int = -1,
    ) -> None:
        owner = type(self).__name__
        common_optimizer(schedulers, optimizer, owner)
        _check_milestones(milestones, len(schedulers), owner)
        LAST_EPOCH.check(last_epoch, owner)
        watch(optimizer)
        self._schedulers = list(schedulers)
        self._milestones = [whole(copied(milestone)) for milestone in milestones]
        self.optimizer = optimizer
        self.last_epoch = last_epoch + 1
        if last_epoch == -1:
            self._start_anew()
        else:
            self.load_state_dict({"last_epoch": self.last_epoch})
        settle(optimizer)

    @property
    def _starts(self) -> list[int]:
        return [0, *self._milestones]

    def _active(self, step: int) -> tuple[Any, int]:
        """The part that sets the rates at a step, and the step at which it stands then."""
        index = active(self._starts, step)
        return self._schedulers[index], step - self._starts[index]

    @skipped
    def step(self) -> None:  # type: ignore[override]
        """Move on by one step, after the optimizer's own `step`."""
        part, within = self._active(self.last_epoch + 1)
        if within == 0 and self.last_epoch >= 0:
            self._follow_groups()
            follow(part)
            part._update_lr(0)
        else:
            if not isinstance(part, LRScheduler):
                follow(part)
            part.step()
        self.last_epoch += 1
        self._last_lr = list(part.get_last_lr())

    def _follow_groups(self) -> Groups:
        follow(self._active(max(self.last_epoch, 0))[0])
        return self.optimizer.param_groups

    def _initial_step(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self.last_epoch = 0
        write(self.optimizer.param_groups, {"lr": self._initial_rates()})
        self._place_parts(0)
        start_anew(self._active(0)[0])
        self._last_lr = self._rates_now()

    def _place_parts(self, step: int) -> None:
        """Put every part where it stands at a step: at its end, within, or before its start."""
        ends = [*self._starts[1:], step + 1]
        for part, start, end in zip(self._schedulers, self._starts, ends, strict=True):
            within = min(step, end - 1) - start
            take(part, {"last_epoch": max(within, -1)})

    def _names(self) -> tuple[str, ...]:
        part, _ = self._active(max(self.last_epoch, 0))
        return part._names() if hasattr(part, "_names") else ("lr",)

    def _values_at(self, step: int) -> dict[str, list[Number]]:
        return values_at(*self._active(step))

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        if "_milestones" in state:
            _check_milestones(state["_milestones"], len(self._schedulers), type(self).__name__)

    def _take_state(self, state: dict[str, Any]) -> None:
        parts = state.pop("_schedulers", None)
        vars(self).update(state)
        if parts is None:
            self._place_parts(self.last_epoch)
            return
        for part, own in zip(self._schedulers, parts, strict=True):
            take(part, own)


def _check_milestones(milestones: Any, count: int, owner: str) -> None:
    require_many(milestones, owner, Collection)
    if len(milestones) != count - 1:
        raise ValueError(
            "Sequential Schedulers expects number of schedulers provided to be one more than the "
            f"number of milestone points, but got number of schedulers {count} and the number of "
            f"milestones to be equal to {len(milestones)} ({owner}: a milestone is the step at "
            "which the next schedule begins)"
        )
    ascending(milestones, owner)
