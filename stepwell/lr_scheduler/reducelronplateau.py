"""ReduceLROnPlateau: the rate falls when a metric has stopped getting better."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, SupportsFloat

from torch.optim import Optimizer
from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchReduceLROnPlateau

from ..compiling import skipped
from ..language.fields import Field, Range
from .hyperparameters import Number, read, write
from .scheduler import LAST_EPOCH, LRScheduler, require_epoch, require_optimizer
from .watch import copied, move_on, watch

FIELDS = (
    Field(
        "factor", 0.1, "number", Range(0, 1, open=")"), spoken="Factor should be < 1.0. Got {value}"
    ),
    Field("patience", 10, "number", Range(0)),
    Field("threshold", 1e-4, "number", Range(0)),
    Field("cooldown", 0, "number", Range(0)),
    Field("eps", 1e-8, "number", Range(0)),
)
MIN_LR = Field("min_lr", 0.0, "number", Range(0))


class ReduceLROnPlateau(LRScheduler, TorchReduceLROnPlateau):
    """Multiplies the rates by `factor` when a metric was no better for `patience` steps.

        rate <- max(rate * factor, min_lr), if that is a change of more than eps

    A metric that is NaN is reported, and counts as no better. The rates depend on the metrics, not
    on the step alone: to resume, load the state.

    Args:
        optimizer: whose rates it sets
        mode: whether the metric should be small ("min") or large ("max")
        factor: what the rates are multiplied by, in [0, 1)
        patience: how many steps in a row may be no better
        threshold: by how much a better metric must be better
        threshold_mode: whether that is a share of the best metric ("rel") or a difference ("abs")
        cooldown: how many steps after a change are not counted
        min_lr: the lowest rate, or a list of one per group; that of a group that joins is 0
        eps: the smallest change that is made
        last_epoch: the last step already taken, which is counted on from; the rates stay

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    >>> for loss in (3.0, 2.0, 2.0, 2.0):
    ...     scheduler.step(loss)
    >>> scheduler.get_last_lr()
    [0.5]
    """

    free_in_state = LRScheduler.free_in_state | {"default_min_lr"}

    def __init__(
        self,
        optimizer: Optimizer,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: list[float] | float = 0,
        eps: float = 1e-8,
        *,
        last_epoch: int = -1,
    ) -> None:
        owner = type(self).__name__
        self._check_arguments({"factor": factor})
        require_optimizer(optimizer, owner)
        self.optimizer = optimizer
        self._take_floors(min_lr)
        self._check_arguments(
            {
                "mode": mode,
                "patience": patience,
                "threshold": threshold,
                "threshold_mode": threshold_mode,
                "cooldown": cooldown,
                "eps": eps,
            }
        )
        LAST_EPOCH.check(last_epoch, owner)
        watch(optimizer)
        self.factor = copied(factor)
        self.patience = copied(patience)
        self.cooldown = copied(cooldown)
        self.eps = copied(eps)
        self.last_epoch = copied(last_epoch) + 1
        self._last_lr = [copied(rate) for rate in read(optimizer.param_groups, "lr")]
        self.mode = mode
        self.threshold = copied(threshold)
        self.threshold_mode = threshold_mode
        self.mode_worse = math.inf if mode == "min" else -math.inf
        self._reset()

    def _take_floors(self, min_lr: Any) -> None:
        owner, groups = type(self).__name__, self.optimizer.param_groups
        listed = isinstance(min_lr, (list, tuple))
        floors = list(min_lr) if listed else [min_lr] * len(groups)
        if len(floors) != len(groups):
            raise ValueError(
                f"expected {len(groups)} min_lrs, got {len(floors)} ({owner}: give one number for "
                "all groups, or a list of one per group)"
            )
        self.default_min_lr = None if listed else copied(MIN_LR.check(min_lr, owner))
        self.min_lrs = [copied(MIN_LR.check(floor, owner)) for floor in floors]

    def _reset(self) -> None:
        self.best = self.mode_worse
        self.cooldown_counter = 0
        self.num_bad_epochs = 0

    @property
    def in_cooldown(self) -> bool:
        """Whether steps are not counted, since the rates have just changed."""
        return self.cooldown_counter > 0

    @skipped
    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Take note of a metric, and lower the rates if it has not become better for long.

        Args:
            metrics: the loss, or what else is watched; a number or a Tensor of one element
            epoch: deprecated; its number
        """
        owner = type(self).__name__
        current = float(metrics)
        if epoch is not None:
            epoch = require_epoch(epoch, owner)
            warnings.warn(EPOCH_DEPRECATION_WARNING, UserWarning, stacklevel=2)
        if math.isnan(current):
            warnings.warn(
                f"{owner}: the metric is NaN, which counts as no better than {self.best}",
                UserWarning,
                stacklevel=2,
            )
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._count(current)
        if self.num_bad_epochs > self.patience:
            self._reduce_lr(self.last_epoch)
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0
        self._last_lr = [copied(rate) for rate in read(self.optimizer.param_groups, "lr")]
        move_on(self.optimizer)

    def _count(self, current: float) -> None:
        if self._is_better(current, self.best):
            self.best = current
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self.in_cooldown:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0

    def _is_better(self, a: float, best: float) -> bool:
        is_share, threshold = self.threshold_mode == "rel", self.threshold
        if self.mode == "min":
            bar: float = best * (1.0 - threshold) if is_share else best - threshold
            return a < bar
        bar = best * (1.0 + threshold) if is_share else best + threshold
        return a > bar

    def _reduce_lr(self, epoch: int) -> None:
        groups = self.optimizer.param_groups
        floor = 0.0 if self.default_min_lr is None else self.default_min_lr
        self.min_lrs = [*self.min_lrs, *[floor] * (len(groups) - len(self.min_lrs))]
        rates: list[Number] = []
        for group, lowest in zip(groups, self.min_lrs, strict=False):
            rate = float(group["lr"])
            lower = max(rate * self.factor, lowest)
            rates.append(lower if rate - lower > self.eps else group["lr"])
        write(groups, {"lr": rates})

    def preview(self, steps: int) -> list[list[float]]:
        """The present rates, for each step: what comes depends on metrics that are not known."""
        return [[float(rate) for rate in self._last_lr] for _ in range(steps)]

    def _check_arguments(self, state: Mapping[str, Any]) -> None:
        owner = type(self).__name__
        for field in FIELDS:
            if field.name in state:
                field.check(state[field.name], owner)
        for name, words, known in (
            ("mode", "mode", ("min", "max")),
            ("threshold_mode", "threshold mode", ("rel", "abs")),
        ):
            if state.get(name, known[0]) not in known:
                raise ValueError(
                    f"{words} {state[name]} is unknown! ({owner}: {name} must be one of "
                    f"{known[0]!r}, {known[1]!r})"
                )

    def _take_state(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.mode_worse = math.inf if self.mode == "min" else -math.inf

    def _values_at(self, step: int) -> dict[str, list[Number]]:
        return {"lr": read(self.optimizer.param_groups, "lr")}
