"""What SequentialLR and ChainedScheduler share: schedules made of schedules, torch's included."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchReduceLROnPlateau

from .hyperparameters import Number, read, write
from .scheduler import LRScheduler, Stage, require_optimizer
from .stored import as_state
from .watch import copied


class Composite(LRScheduler):
    """A schedule that drives others; each knows where it stands itself."""

    _schedulers: Sequence[Any]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, with the states of the parts, in torch's layout."""
        parts = [part.state_dict() for part in self._schedulers]
        return {**super().state_dict(), "_schedulers": parts}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        given = state.get("_schedulers", self._schedulers)
        if not isinstance(given, (list, tuple)):
            given = ()
        if len(given) != len(self._schedulers):
            raise ValueError(
                f"{type(self).__name__}: the state holds {len(given)} schedulers, there are "
                f"{len(self._schedulers)}"
            )
        for part, own in zip(self._schedulers, state.get("_schedulers", ()), strict=False):
            own = as_state(own, f"{type(self).__name__}, {type(part).__name__}")
            if isinstance(part, LRScheduler):
                part._check_state(own)

    def _initial_rates(self) -> list[Number]:
        return [group["initial_lr"] for group in self.optimizer.param_groups]

    def _update_lr(self, epoch: int | None = None) -> None:
        """What a schedule that this one is a part of asks of it."""
        if epoch is None:
            self.step()
            return
        self._take_state({"last_epoch": epoch})
        self._write(self._values_at(epoch), self.optimizer.param_groups)


def follow(part: Any) -> None:
    """Let a part take in groups that have joined; torch's own schedules know of none."""
    if isinstance(part, LRScheduler):
        part._follow_groups()
        return
    groups = part.optimizer.param_groups
    bases = getattr(part, "base_lrs", None)
    if bases is None or len(bases) >= len(groups):
        return
    for group in groups[len(bases) :]:
        first, share = LRScheduler._share(part, group)
        first = groups[0] if first is None else first
        for key in ("initial_lr", "max_lr", "min_lr"):
            if key in first:
                group.setdefault(key, copied(first[key] * share))
        for key in ("max_momentum", "base_momentum"):
            if key in first:
                group.setdefault(key, copied(first[key]))
        bases.append(copied(group["initial_lr"]))
        if hasattr(part, "max_lrs"):
            part.max_lrs.append(part.max_lrs[0] * share)
        for name in ("base_momentums", "max_momentums", "lr_lambdas"):
            if hasattr(part, name):
                getattr(part, name).append(copied(getattr(part, name)[0]))


def take(part: Any, state: dict[str, Any]) -> None:
    """Let a part take over a state, or only the step in it; the rates stay as they are."""
    if isinstance(part, LRScheduler):
        part._take_state(state)
    elif state.keys() == {"last_epoch"}:
        part.last_epoch = state["last_epoch"]
    else:
        part.load_state_dict(state)


def start_anew(part: Any) -> None:
    """Let a part write its first rates."""
    if isinstance(part, LRScheduler):
        part._start_anew()
    else:
        part.last_epoch = -1
        part._initial_step()


def values_at(part: Any, step: int) -> dict[str, list[Number]]:
    """What untouched groups hold when a part stands at a step."""
    if isinstance(part, LRScheduler):
        return part._values_at(step)
    stage = Stage(part.optimizer)
    double = deepcopy(part, {id(part.optimizer): stage})
    write(stage.param_groups, {"lr": [group["initial_lr"] for group in stage.param_groups]})
    double._update_lr(step)
    return {"lr": read(stage.param_groups, "lr")}


def common_optimizer(
    schedulers: Sequence[Any], optimizer: Optimizer | None, owner: str, verb: str = ""
) -> Optimizer:
    """The optimizer that all schedules of a composite drive.

    Raises:
        ValueError: there is none, one needs a metric, or they drive different optimizers
        TypeError: one is no schedule, or they are no list
    """
    if not isinstance(schedulers, Collection):
        raise TypeError(
            f"{owner}: schedulers must be a list of schedules, got {type(schedulers).__name__}"
        )
    if len(schedulers) < 1:
        raise ValueError(
            f"{owner} expects at least one scheduler{verb}, but got no scheduler. "
            "(schedulers must be a list of schedules)"
        )
    for index, part in enumerate(schedulers):
        if not hasattr(part, "optimizer"):
            raise TypeError(
                f"{owner} at index {index} should have `optimizer` as its attribute. "
                f"(got {part!r}, which is no schedule)"
            )
        if isinstance(part, TorchReduceLROnPlateau):
            raise ValueError(
                f"{owner} does not support `ReduceLROnPlateau` scheduler as it requires additional "
                "kwargs to be specified when calling `step`, "
                f"but got one at index {index} in the given schedulers sequence. "
                "(step it by itself, with its metric)"
            )
        optimizer = part.optimizer if optimizer is None else optimizer
        if part.optimizer is not optimizer:
            raise ValueError(
                f"{owner} expects all schedulers to belong to the same optimizer, but "
                f"got scheduler {type(part).__name__} at index {index} has {part.optimizer}, "
                f"which is different from {type(optimizer).__name__}. "
                "(construct all schedulers with the same optimizer)"
            )
    require_optimizer(optimizer, owner)
    return cast(Optimizer, optimizer)
