"""The stateful shell that every schedule shares, to torch's contract, and how a curve drives it.

A curve says what its rate is at a step; everything that has to be remembered, saved, warned about
or written into the optimizer is said here, once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler as TorchLRScheduler
from torch.utils.hooks import RemovableHandle

from ..language.fields import Field, Range

LAST_EPOCH = Field("last_epoch", -1, "integer", Range(-1))

STEP_ORDER = (
    "Detected call of `lr_scheduler.step()` before `optimizer.step()`. In PyTorch 1.1.0 and later, "
    "you should call them in the opposite order: `optimizer.step()` before `lr_scheduler.step()`.  "
    "Failure to do this will result in PyTorch skipping the first value of the learning rate "
    "schedule. See more details at "
    "https://pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate"
)
STEP_EPOCH = (
    "The epoch parameter in `scheduler.step()` was not necessary and is being deprecated where "
    "possible. Please use `scheduler.step()` to step the scheduler. During the deprecation, if "
    "epoch is different from None, the closed form is used instead of the new chainable form, "
    "where available."
)
GET_LR = "To get the last learning rate computed by the scheduler, please use `get_last_lr()`."


class LRScheduler(TorchLRScheduler):
    """Base class of all schedules: an optimizer, a step count and the rates it writes.

    A subclass says in `get_lr` what the rates of the groups are once `last_epoch` has moved on;
    one whose rate is a function of the step derives from `CurveLR` instead.

    Attributes:
        optimizer: whose rates it sets
        base_lrs: the rate that each group started with
        last_epoch: the step the rates stand at; 0 after construction

    Raises:
        TypeError: `optimizer` is no optimizer
        ValueError: `last_epoch` is below -1
        KeyError: `last_epoch` resumes a schedule, but a group does not know its `initial_lr`
    """

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        owner = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{type(optimizer).__name__} is not an Optimizer "
                f"({owner}: optimizer must be one, such as stepwell.AdamW)"
            )
        LAST_EPOCH.check(last_epoch, owner)
        self.optimizer = optimizer
        if last_epoch >= 0:
            _require_initial_rates(optimizer, owner)
        self.base_lrs = [_initial_rate(group) for group in optimizer.param_groups]
        self.last_epoch = last_epoch
        # a plain function: a method as hook would keep the scheduler alive with the optimizer
        self._watch: RemovableHandle | None = optimizer.register_step_post_hook(_mark_stepped)
        self._initial_step()

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the groups at `last_epoch`; for the latest ones call `get_last_lr`."""
        raise NotImplementedError

    def get_last_lr(self) -> list[float | Tensor]:
        """The rates that the latest `step` wrote, one per group; Tensors are copies."""
        return self._last_lr

    def step(self, epoch: int | None = None) -> None:
        """Move on by one step, after the optimizer's own `step`.

        Args:
            epoch: deprecated; go to this step and set the rates by the closed form
        """
        if self._watch is not None and not self._is_initial:
            self._check_order()
        self._step_count += 1
        if epoch is not None:
            warnings.warn(STEP_EPOCH, UserWarning, stacklevel=2)
        self._update_lr(epoch)

    def preview(self, steps: int) -> list[list[float]]:
        """The rates of the groups at this step and at those after it, without moving.

        Args:
            steps: how many steps are asked for, this one included

        Returns:
            for each step a list of numbers, one per group
        """
        groups = [{**group, "params": []} for group in self.optimizer.param_groups]
        stage = SimpleNamespace(param_groups=deepcopy(groups), defaults=self.optimizer.defaults)
        double = deepcopy(self, {id(self.optimizer): stage})
        seen = []
        for step in range(steps):
            if step:
                double.step()
            seen.append([float(group["lr"]) for group in stage.param_groups])
        return seen

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, in torch's layout."""
        return {k: v for k, v in vars(self).items() if k not in ("optimizer", "_watch")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` of this class, or of torch's class of this name, returned."""
        vars(self).update(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # a copied or unpickled optimizer has no hooks
        return {**vars(self), "_watch": None}

    def _initial_step(self) -> None:
        self._step_count = 0
        self._is_initial = True
        try:
            self.step()
        finally:
            self._is_initial = False

    def _update_lr(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        groups = self.optimizer.param_groups
        joined = groups[len(self.base_lrs) :]
        self.base_lrs = self.base_lrs + [_initial_rate(group) for group in joined]
        self._get_lr_called_within_step = True
        try:
            closed = None if epoch is None else getattr(self, "_get_closed_form_lr", None)
            rates = self.get_lr() if closed is None else closed()
        finally:
            self._get_lr_called_within_step = False
        for group, rate in zip(groups, rates, strict=True):
            _write_rate(group, rate)
        self._last_lr = [_copy(group["lr"]) for group in groups]

    def _check_order(self) -> None:
        """Warn at the first step if the optimizer has not stepped, then watch it no longer."""
        assert self._watch is not None
        self._watch.remove()
        self._watch = None
        stepped = getattr(self.optimizer, "_opt_called", False) or "step" in vars(self.optimizer)
        if self._step_count == 1 and not stepped and not _refused_by_scaler(self.optimizer):
            warnings.warn(STEP_ORDER, UserWarning, stacklevel=3)


class CurveLR(LRScheduler):
    """A schedule whose rate is the initial rate times a pure function of the step, `factor`.

    A rate that nobody else touches is the closed form, `initial rate * factor(step)`, at every
    step: it does not drift, and resuming from a step count alone gives the same bits. A rate that
    was changed by hand, or that a second schedule works on too, is moved by the ratio of the
    factors of two neighbouring steps, as torch's chained form does.

    A new curve declares its arguments and their ranges in `fields`, stores them, and says
    `factor`.
    """

    fields: ClassVar[tuple[Field, ...]] = ()

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        self._check(vars(self))
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """What the initial rate is multiplied by at this step."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the groups at `last_epoch`; for the latest ones call `get_last_lr`."""
        if not self._get_lr_called_within_step:
            warnings.warn(GET_LR, UserWarning, stacklevel=2)
        before = self.factor(self.last_epoch - 1) if self.last_epoch > 0 else 1.0
        after = self.factor(self.last_epoch)
        return [
            _next_rate(group["lr"], base, before, after) for group, base in self._groups_and_bases()
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` of this class, or of torch's class of this name, returned.

        Raises:
            ValueError, TypeError: an argument of the curve is out of range; nothing is changed
        """
        self._check(state_dict)
        super().load_state_dict(state_dict)

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        factor = self.factor(self.last_epoch)
        return [base * factor for _, base in self._groups_and_bases()]

    def _groups_and_bases(self) -> Iterable[tuple[dict[str, Any], float | Tensor]]:
        # a group may have been taken away by hand
        return zip(self.optimizer.param_groups, self.base_lrs, strict=False)

    def _check(self, values: dict[str, Any]) -> None:
        for field in self.fields:
            if field.name in values:
                field.check(values[field.name], type(self).__name__)


def _next_rate(
    rate: float | Tensor, base: float | Tensor, before: float, after: float
) -> float | Tensor:
    """The rate after a step whose factor goes from `before` to `after`."""
    chained = _chained_rate(rate, base, before, after)
    if not isinstance(rate, Tensor):
        base = float(base)
        return base * after if math.isclose(rate, base * before) else chained
    # without asking for the numbers, which on an accelerator would mean to wait for them
    untouched = torch.isclose(rate, torch.as_tensor(base * before).to(rate), rtol=1e-6, atol=0.0)
    return torch.where(untouched, base * after, chained).detach()


def _chained_rate(
    rate: float | Tensor, base: float | Tensor, before: float, after: float
) -> float | Tensor:
    if before:
        return rate * (after / before)
    # zero has no ratio: a rate set by hand survives while the factor stays, else the curve wins
    return rate if after == before else base * after


def _initial_rate(group: dict[str, Any]) -> float | Tensor:
    rate: float | Tensor = _copy(group.setdefault("initial_lr", _copy(group["lr"])))
    return rate


def _require_initial_rates(optimizer: Optimizer, owner: str) -> None:
    for index, group in enumerate(optimizer.param_groups):
        if "initial_lr" not in group:
            raise KeyError(
                f"param 'initial_lr' is not specified in param_groups[{index}] when resuming "
                f"scheduler with last_epoch >= 0. ({owner}: load the optimizer's state_dict, which "
                "holds it, before making the scheduler, or leave last_epoch=-1)"
            )


def _write_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """Set a group's rate; a Tensor is filled in place, since others may hold on to it."""
    held = group["lr"]
    if isinstance(held, Tensor):
        with torch.no_grad():
            held.fill_(rate.squeeze() if isinstance(rate, Tensor) else rate)
    else:
        group["lr"] = rate


def _copy(rate: Any) -> Any:
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def _mark_stepped(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # the name under which torch's own schedules look for it
    optimizer._opt_called = True  # type: ignore[attr-defined]


def _refused_by_scaler(optimizer: Optimizer) -> bool:
    """Whether a gradient is not finite: then a GradScaler held the step back, rightly."""
    grads = (p.grad for group in optimizer.param_groups for p in group["params"])
    return not all(_finite(grad) for grad in grads if grad is not None)


def _finite(grad: Tensor) -> bool:
    return bool(torch.isfinite(grad.coalesce().values() if grad.is_sparse else grad).all())
