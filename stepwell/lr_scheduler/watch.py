"""Record what happens to an optimizer for its schedules: steps, loads, and values the user sets.

One optimizer may have many schedules. All of them share the record, which is freed with the
optimizer.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Mapping
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

from ..language.number import is_fake, is_number
from ..matching import are_alike

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
        meant: what was loaded into each group or set there by the user, which wins over what
            constructors of schedules write; None once a schedule has moved on from there
        stood: the groups as loading, or a schedule, has left them
        loads: how many times something was loaded
        handle: of the hook that sees its first step; None once it was seen
        bell: whether a GradScaler has tried to step
    """

    meant: list[dict[str, Any]] | None
    stood: list[dict[str, Any]]
    loads: int = 0
    handle: RemovableHandle | None = None
    bell: ScalerBell = field(default_factory=ScalerBell)


OWN = (f"{__package__}.", "torch.optim.lr_scheduler")
"""Modules of schedules, which may step each other."""

WATCHES: WeakKeyDictionary[Optimizer, Watch] = WeakKeyDictionary()


def watch(optimizer: Optimizer) -> None:
    """Begin to watch, or look again, before a constructor of a schedule writes into the groups."""
    if optimizer in WATCHES:
        look(optimizer)
        if WATCHES[optimizer].meant is None:
            # what is set from now on counts
            WATCHES[optimizer].meant = []
            settle(optimizer)
        return
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        return
    known = [group for group in optimizer.param_groups if "initial_lr" in group]
    is_used = known and (any(g["lr"] != g["initial_lr"] for g in known) or has_trained(optimizer))
    # torch's own schedules have written into the groups, if they were here before
    is_as_loaded = is_used and not hasattr(optimizer.step, "_wrapped_by_lr_sched")
    stood = _copy_groups(optimizer)
    made = WATCHES[optimizer] = Watch(stood if is_as_loaded else [{} for _ in stood], stood)
    # plain functions: a method as hook would keep the schedule alive with the optimizer
    made.handle = optimizer.register_step_post_hook(_mark_stepped)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = made.bell  # type: ignore[attr-defined]
    # a wrapper that never called Optimizer's constructor may have hooks of steps only
    with suppress(AttributeError):
        optimizer.register_load_state_dict_post_hook(partial(_mark_loaded, ref(optimizer)))


def settle(optimizer: Optimizer) -> None:
    """Take note that what the groups hold now was written by a schedule, not by the user."""
    watch = WATCHES.get(optimizer)
    if watch is not None:
        watch.stood = _copy_groups(optimizer)


def meant_values(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return what was loaded into each group, or set there by the user, as `look` has found it.

    It is empty once a schedule has moved on.
    """
    watch = WATCHES.get(optimizer)
    meant = [] if watch is None or watch.meant is None else watch.meant
    groups = optimizer.param_groups
    return [*meant, *({} for _ in groups[len(meant) :])][: len(groups)]


def look(optimizer: Optimizer) -> None:
    """Find what the user has set in the groups since loading, or a schedule, has left them."""
    watch = WATCHES.get(optimizer)
    if watch is not None and watch.meant is not None:
        now = _copy_groups(optimizer)
        stood = [*watch.stood, *now[len(watch.stood) :]]
        watch.meant = [
            {**meant, **_changed(before, after, meant)}
            for meant, before, after in zip(meant_values(optimizer), stood, now, strict=False)
        ]
        watch.stood = now


def _changed(
    before: Mapping[str, Any], after: Mapping[str, Any], meant: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the changed values; unchanged items of a tuple such as betas come from `meant`."""
    changed = {key: v for key, v in after.items() if not are_alike([before.get(key), v])}
    for key, value in changed.items():
        stood, kept = before.get(key), meant.get(key)
        if isinstance(value, tuple) and isinstance(stood, tuple) and isinstance(kept, tuple):
            items = zip(value, stood, kept, strict=False)
            changed[key] = tuple(k if are_alike([v, s]) else v for v, s, k in items)
    return changed


def loads(optimizer: Optimizer) -> int:
    """How many times something was loaded into the optimizer."""
    watch = WATCHES.get(optimizer)
    return 0 if watch is None else watch.loads


def move_on(optimizer: Optimizer) -> None:
    """Take note that a schedule steps."""
    watch = WATCHES.get(optimizer)
    if watch is not None:
        watch.meant = None
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


def has_trained(optimizer: Optimizer) -> bool:
    """Return whether the optimizer holds the state of a step that it has taken or loaded."""
    states = getattr(optimizer, "state", {}).values()
    counts = [state.get("step", 1) for state in states if isinstance(state, Mapping) and state]
    # some make their state in the constructor, with a count of zero
    return any(is_number(count) and _is_above_zero(count) for count in counts)


def _is_above_zero(count: Any) -> bool:
    return not (isinstance(count, Tensor) and is_fake(count)) and bool(count > 0)


def check_order(optimizer: Optimizer) -> None:
    """Warn of a schedule that steps before the optimizer, unless a GradScaler held that back."""
    if not (has_stepped(optimizer) or _held_back_by_scaler(optimizer)):
        warnings.warn(STEP_ORDER, UserWarning, stacklevel=level_of_caller())


def level_of_caller() -> int:
    """How many frames above the one that asks the first line lies that is no schedule's own."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(OWN):
        frame, level = frame.f_back, level + 1
    return level


def _copy_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {key: snapshot(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def copied(value: Any) -> Any:
    """Return the value as a schedule may keep it: a copy of a Tensor, a plain number of NumPy's.

    Others may hold on to a Tensor, and a file that may hold no code has no scalars of NumPy.
    """
    if isinstance(value, Tensor):
        # what is filled in place with rates would be cut to whole numbers
        is_exact = value.is_floating_point() or value.is_complex()
        return value.detach().clone() if is_exact else value.detach().float()
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
        watch.meant = watch.stood = _copy_groups(optimizer)
        watch.loads += 1


def _held_back_by_scaler(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has asked, or a gradient is not finite: then one held the step back."""
    if WATCHES[optimizer].bell.asked:
        return True
    grads = (p.grad for group in optimizer.param_groups for p in group["params"])
    return not all(_finite(grad) for grad in grads if grad is not None)


def _finite(grad: Tensor) -> bool:
    return bool(torch.isfinite(grad.coalesce().values() if grad.is_sparse else grad).all())
