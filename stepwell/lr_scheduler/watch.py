"""What schedules know of their optimizer's life: has it stepped, and what was loaded into it?

One optimizer may have many schedules. All of them share what is remembered here, and it is given up
with the optimizer.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

STEP_ORDER = (
    "Detected call of `lr_scheduler.step()` before `optimizer.step()`. In PyTorch 1.1.0 and later, "
    "you should call them in the opposite order: `optimizer.step()` before `lr_scheduler.step()`.  "
    "Failure to do this will result in PyTorch skipping the first value of the learning rate "
    "schedule. See more details at "
    "https://pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate"
)


class ScalerBell:
    """False, as an optimizer's `_step_supports_amp_scaling`, and takes note of who asks.

    A GradScaler asks before it steps, or does not step since a gradient is not finite. Nothing else
    tells such a step that never was from one that is yet to come: the gradients may be gone.
    """

    asked = False

    def __bool__(self) -> bool:
        self.asked = True
        return False

    def __reduce__(self) -> Any:
        # a copy or a pickle of an optimizer has what it would have without schedules
        return bool, ()


@dataclass
class Watch:
    """What is remembered of one optimizer.

    Attributes:
        loaded: its groups as they were loaded, until a schedule has moved on from there
        loads: how many times something was loaded
        handle: of the hook that sees its first step; None once it was seen
        bell: whether a GradScaler has tried to step
    """

    loaded: list[dict[str, Any]] | None
    loads: int = 0
    handle: RemovableHandle | None = None
    bell: ScalerBell = field(default_factory=ScalerBell)


OWN = (f"{__package__}.", "torch.optim.lr_scheduler")
"""Modules of schedules, which may step each other."""

WATCHES: WeakKeyDictionary[Optimizer, Watch] = WeakKeyDictionary()


def watch(optimizer: Optimizer) -> None:
    """Begin to watch, before a schedule writes into the groups for the first time."""
    if optimizer in WATCHES or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        return
    moved = [g for g in optimizer.param_groups if "initial_lr" in g and g["lr"] != g["initial_lr"]]
    # torch's own schedules have written into the groups, if they were here before
    is_as_loaded = moved and not hasattr(optimizer.step, "_wrapped_by_lr_sched")
    made = WATCHES[optimizer] = Watch(_copy_groups(optimizer) if is_as_loaded else None)
    # plain functions: a method as hook would keep the schedule alive with the optimizer
    made.handle = optimizer.register_step_post_hook(_mark_stepped)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = made.bell  # type: ignore[attr-defined]
    # a wrapper that never called Optimizer's constructor may have hooks of steps only
    with suppress(AttributeError):
        optimizer.register_load_state_dict_post_hook(partial(_mark_loaded, ref(optimizer)))


def loaded_groups(optimizer: Optimizer) -> list[dict[str, Any]] | None:
    """The groups as they were loaded, if nothing has moved on since."""
    watch = WATCHES.get(optimizer)
    return None if watch is None else watch.loaded


def loads(optimizer: Optimizer) -> int:
    """How many times something was loaded into the optimizer."""
    watch = WATCHES.get(optimizer)
    return 0 if watch is None else watch.loads


def move_on(optimizer: Optimizer) -> None:
    """Take note that a schedule steps."""
    watch = WATCHES.get(optimizer)
    if watch is not None:
        watch.loaded = None
        if watch.handle is not None and has_stepped(optimizer):
            watch.handle.remove()
            watch.handle = None


def has_stepped(optimizer: Optimizer) -> bool:
    """Whether the optimizer has stepped, as far as anybody can tell."""
    step = vars(optimizer).get("step")
    # torch's own schedules replace it by one that marks its call
    foreign = step is not None and not hasattr(step, "_wrapped_by_lr_sched")
    # copies have no hooks that could see it
    return getattr(optimizer, "_opt_called", False) or foreign or optimizer not in WATCHES


def check_order(optimizer: Optimizer) -> None:
    """Warn of a schedule that steps before the optimizer, unless a GradScaler held that back."""
    if not (has_stepped(optimizer) or _held_back_by_scaler(optimizer)):
        warnings.warn(STEP_ORDER, UserWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """How many frames above the one that asks the first line lies that is no schedule's own."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(OWN):
        frame, level = frame.f_back, level + 1
    return level


def _copy_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {key: copied(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def copied(value: Any) -> Any:
    """Return the value as a schedule may keep it: a copy of a Tensor, a plain number of NumPy's.

    Others may hold on to a Tensor, and a file that may hold no code has no scalars of NumPy.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.item() if isinstance(value, np.generic) else value


def snapshot(value: Any) -> Any:
    """Return a copy that later changes of lists, dicts and Tensors do not reach."""
    kind = type(value)
    if kind in (list, tuple):
        return kind(map(snapshot, value))
    if kind in (dict, Counter):
        return kind({key: snapshot(item) for key, item in value.items()})
    return copied(value)


def _mark_stepped(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # the name under which torch's own schedules look for it
    optimizer._opt_called = True  # type: ignore[attr-defined]


def _mark_loaded(watched: ref[Optimizer], _: Optimizer) -> None:
    """Take note of a load: where a wrapper is watched, the one that loads is the one inside."""
    optimizer = watched()
    watch = None if optimizer is None else WATCHES.get(optimizer)
    if optimizer is not None and watch is not None:
        watch.loaded = _copy_groups(optimizer)
        watch.loads += 1


def _held_back_by_scaler(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has asked, or a gradient is not finite: then one held the step back."""
    if WATCHES[optimizer].bell.asked:
        return True
    grads = (p.grad for group in optimizer.param_groups for p in group["params"])
    return not all(_finite(grad) for grad in grads if grad is not None)


def _finite(grad: Tensor) -> bool:
    return bool(torch.isfinite(grad.coalesce().values() if grad.is_sparse else grad).all())
