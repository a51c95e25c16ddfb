"""load: a file into a training, checked as a whole before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..groups.naming import unwrapped
from ..lr_scheduler.scheduler import Stage
from ..matching import LoadReport, shown
from ..optimizer import Optimizer
from ..state_dict import Loading, Policy
from .contents import named, rule_of
from .header import CheckpointError
from .modules import Fit, fit
from .randomness import check_random_state, set_random_state
from .reading import File, opened
from .schedules import regrouped
from .states import (
    Rename,
    Source,
    as_real,
    checked_optimizer,
    kinds,
    renamed,
    state_dict_with,
    targets,
)
from .values import unpack

__all__ = ["Loaded", "load"]


class Loaded(NamedTuple):
    """What `load` did.

    Attributes:
        report: what of the file was not loaded; with `strict` nothing
        extra: what was saved as `extra`
    """

    report: LoadReport
    extra: Any


def load(
    path: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    model: torch.nn.Module | None = None,
    scheduler: Any = None,
    averaged: torch.nn.Module | None = None,
    strict: bool = True,
    rename: Rename | None = None,
    dtype: str | torch.dtype = "saved",
    with_random_state: bool = False,
) -> Loaded:
    """Load what `save` has written, into what is given here.

    Everything is matched by name, and checked before anything is changed. Tensors are read into
    where they belong: beyond what is there afterwards, some 20 MB are needed.

    Args:
        path: the file
        optimizer: its groups and state; parameters are known by name, its own or the model's
        model: its parameters and buffers are overwritten where they lie
        scheduler: whatever was saved as one
        averaged: whatever was saved as one
        strict: refuse a file that does not fit; otherwise load what fits, for fine-tuning
        rename: regular expressions and what their matches are replaced with, in saved names
        dtype: keep state in the precision in which it was "saved", where parameters have that too;
            cast it to that of its parameter ("param"), or to this one. Parameters keep their own
        with_random_state: set all random number generators to what they were

    Returns:
        what was not loaded, and `extra`

    Raises:
        CheckpointError: the file is damaged or does not fit; nothing is changed. A disk may fail
            after the check, while the model is overwritten: then it lists the tensors that are
        OSError: it cannot be read
    """
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"load: optimizer must be one of stepwell, got {type(optimizer).__module__}."
            f"{type(optimizer).__name__}; `python -m stepwell checkpoint convert` makes files for "
            "torch.optim"
        )
    policy = Policy(dtype, "load")
    with ExitStack() as stack:
        file = stack.enter_context(opened(path))
        if optimizer is not None:
            stack.enter_context(named(optimizer, model))
        plan = _Plan(file, strict, rename or {}, policy)
        plan.take(optimizer, model, averaged, scheduler)
        extra, randomness = (plan.whole(key) for key in ("extra", "random"))
        if with_random_state:
            check_random_state(randomness)
        plan.read()
        plan.commit()
        if with_random_state:
            set_random_state(randomness)
        return Loaded(plan.report, extra)


class _Plan:
    """What is going to be loaded into what."""

    def __init__(self, file: File, strict: bool, rename: Rename, policy: Policy) -> None:
        self._file, self._strict, self._rename, self._policy = file, strict, rename, policy
        self._source = Source(file)
        self._fits: list[Fit] = []
        self._optimizer: tuple[Optimizer, Loading] | None = None
        self._scheduler: tuple[Any, Any] | None = None
        self.report = LoadReport()

    def take(self, optimizer: Any, model: Any, averaged: Any, scheduler: Any) -> None:
        """Match all that is given; raises if it does not fit."""
        given = {
            "optimizer": optimizer,
            "model": model,
            "averaged": averaged,
            "scheduler": scheduler,
        }
        lacking = [key for key, part in given.items() if part is not None and not self._has(key)]
        reports = [LoadReport(missing=tuple(f"{key}: not in the file" for key in lacking))]
        for key, module in (("model", model), ("averaged", averaged)):
            if module is not None and key not in lacking:
                reports.append(self._take_module(key, module))
        if optimizer is not None and "optimizer" not in lacking:
            reports.append(self._take_optimizer(optimizer))
        columns = zip(*reports, strict=True)
        self.report = LoadReport(*(tuple(chain(*column)) for column in columns))
        if self._strict and not self.report.is_empty:
            raise CheckpointError(
                f"does not fit:{self.report.listing}\n  (nothing was loaded; strict=False loads "
                "what fits, and rename={...} changes saved names)"
            )
        if scheduler is not None and "scheduler" not in lacking:
            self._take_scheduler(scheduler)

    def _has(self, key: str) -> bool:
        return key in self._file.description

    def whole(self, key: str) -> Any:
        """A part of the file with all its tensors, or None."""
        source = Source(self._file, whole=True)
        return unpack(self._file.description.get(key), source)

    def _take_module(self, key: str, module: torch.nn.Module) -> LoadReport:
        saved = unpack(self._file.description[key], self._source)
        if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
            raise CheckpointError(f"is damaged: {key} is no state dict")
        saved = renamed(saved, self._rename)
        found = fit(key, unwrapped(module), saved, strict_dtype=self._policy.dtype == "saved")
        self._fits.append(found)
        return found.report

    def _take_optimizer(self, optimizer: Optimizer) -> LoadReport:
        packed = checked_optimizer(self._file.description["optimizer"])
        report = kinds(optimizer, packed, self._rename, self._policy)
        state_dict = state_dict_with(packed, self._source, self._rename)
        policy = Policy(self._policy.dtype, rule_of(optimizer), deferred=True)
        try:
            loading = optimizer._prepare_load(state_dict, self._strict, policy)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"does not fit: {error} (nothing was loaded)") from error
        self._optimizer = optimizer, loading
        return LoadReport(*(a + b for a, b in zip(report, loading.report, strict=True)))

    def _take_scheduler(self, scheduler: Any) -> None:
        state = self.whole("scheduler")
        if self._optimizer is not None:
            sources = self._optimizer[1].matched.groups
            state = regrouped(state, scheduler.state_dict(), sources)
        try:
            # what it refuses, it refuses of a copy
            stage = Stage(scheduler.optimizer)
            deepcopy(scheduler, {id(scheduler.optimizer): stage}).load_state_dict(deepcopy(state))
        except Exception as error:
            raise CheckpointError(
                f"does not fit: scheduler: {type(error).__name__}: {error} (nothing was loaded)"
            ) from error
        self._scheduler = scheduler, state

    def read(self) -> None:
        """Read what goes into new tensors, and compare everything else with its digests."""
        fresh = [] if self._optimizer is None else targets(self._optimizer[1], self._source)
        # what is overwritten, last: it is read once more, and then the system still has it
        compared = dict.fromkeys(name for name, _ in self._overwritten())
        self._file.fill([*fresh, *compared.items()])

    def _overwritten(self) -> list[tuple[str, Tensor]]:
        pairs = [pair for found in self._fits for pair in found.pairs]
        named = [(self._source.name_of(saved), live) for saved, live in pairs]
        return [(name, as_real(live)) for name, live in named if name is not None]

    def commit(self) -> None:
        """Change everything."""
        undo = self._commit_optimizer()
        try:
            self._file.fill(self._overwritten())
        except BaseException as error:
            # a disk that fails now, or an interrupt: there is no memory for a second copy
            undo()
            if not isinstance(error, Exception):
                raise
            raise CheckpointError(self._half_loaded(error)) from error
        for found in self._fits:
            found.finish(self._source.name_of)
        if self._scheduler is not None:
            scheduler, state = self._scheduler
            scheduler.load_state_dict(state)

    def _commit_optimizer(self) -> Callable[[], None]:
        """Load the optimizer, if there is one; returns what undoes it."""
        if self._optimizer is None:
            return lambda: None
        optimizer, loading = self._optimizer
        state, groups = dict(optimizer.state), [dict(group) for group in optimizer.param_groups]
        try:
            optimizer._finish_load(loading)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"does not fit: {error} (nothing was loaded)") from error
        return lambda: optimizer._finish_load(loading._replace(state=state, groups=groups))

    def _half_loaded(self, error: Exception) -> str:
        names = shown(sorted(self._file.touched))
        return (
            f"was whole, and could not be read once more: {error}\n  The model is half loaded. "
            "These are overwritten, wholly or in part; everything else is what it was:"
            + "".join(f"\n  {name}" for name in names)
        )
