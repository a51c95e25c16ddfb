"""load: a file into a training, checked as a whole before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..groups.naming import unwrapped
from ..matching import LoadReport, Match, match, shown
from ..optimizer import Optimizer
from ..state_dict import Loading, Policy
from ..wrapped import inner_optimizer, inner_scheduler
from . import schedules, states
from .background import Background
from .contents import check_module, check_named, check_scheduler, named, rule_of
from .header import CheckpointError
from .modules import Fit, fit
from .names import Rename, Rules, aliases, checked_rename, matched_names, names_inside, ties
from .randomness import check_random_state, set_random_state
from .reading import File, opened
from .refusals import refusal
from .rules import rule_differences
from .states import Source, as_real, checked_optimizer, kinds, state_dict_with, targets
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
    *unnamed: NoReturn,
    optimizer: torch.optim.Optimizer | None = None,
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
        unnamed: nothing; parts of a training have names
        optimizer: its groups and state; parameters are known by name, its own or the model's. One
            of stepwell, or a wrapper around one
        model: its parameters and buffers are overwritten where they lie
        scheduler: whatever was saved as one, of the same class; several groups are known by the
            names of their parameters, from its optimizer or the model
        averaged: whatever was saved as one
        strict: refuse a file that does not fit; otherwise load what fits, for fine-tuning
        rename: regular expressions and what their matches are replaced with, in saved names
        dtype: keep state in the precision in which it was "saved", where parameters have that too;
            cast it to that of its parameter ("param"), or to this one. Parameters keep their own
        with_random_state: set all random number generators to what they were

    Returns:
        what was not loaded, and `extra`

    Raises:
        TypeError: something is given without its name, or is of another kind
        CheckpointError: the file is damaged or does not fit; nothing is changed. A disk may fail
            after the check, while the model is overwritten: then it lists the tensors that are
        ValueError: a parameter of the optimizer has no name, or one that is there twice
        OSError: it cannot be read
    """
    check_named(unnamed, "load")
    # the file may be what is being saved
    Background.settle()
    if optimizer is not None:
        optimizer = _checked_optimizer(optimizer)
    for what, module in (("model", model), ("averaged", averaged)):
        if module is not None:
            check_module(module, f"load: {what}")
    if scheduler is not None:
        check_scheduler(scheduler, "load")
    rules, policy = checked_rename(rename), Policy(dtype, "load")
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            # what is made here is going to be trained
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        file = stack.enter_context(opened(path))
        if optimizer is not None:
            stack.enter_context(named(optimizer, model))
        plan = _Plan(file, strict, rules, policy)
        plan.take(optimizer, model, averaged, scheduler)
        extra = plan.whole("extra")
        randomness = plan.whole("random") if with_random_state else None
        if with_random_state:
            check_random_state(randomness)
        plan.read()
        plan.commit()
        try:
            plan.run_hooks()
        finally:
            if with_random_state:
                set_random_state(randomness)
        return Loaded(plan.report, extra)


def _checked_optimizer(optimizer: Any) -> Optimizer:
    inner = inner_optimizer(optimizer, "load")
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"load: optimizer must be one of stepwell, got {type(inner).__module__}."
            f"{type(inner).__name__}; `python -m stepwell checkpoint convert` makes files for "
            "torch.optim"
        )
    return inner


class _Plan:
    """What is going to be loaded into what."""

    def __init__(self, file: File, strict: bool, rename: Rules, policy: Policy) -> None:
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
                reports.append(self._take_module(key, unwrapped(module)))
        if optimizer is not None and "optimizer" not in lacking:
            reports.append(self._take_optimizer(optimizer, model))
            if self._optimizer is None and scheduler is not None:
                # whose rates would go into groups of another rule
                lacking.append("scheduler")
                reports.append(LoadReport(mismatched=("scheduler: it was one of another rule",)))
        if scheduler is not None and "scheduler" not in lacking:
            reports.append(self._take_scheduler(scheduler, model))
        self.report = _joined(reports)
        if self._strict and not self.report.is_empty:
            raise refusal(self.report)
        self._rehearse()

    def _has(self, key: str) -> bool:
        return key in self._file.description

    def whole(self, key: str) -> Any:
        """A part of the file with all its tensors, or None."""
        source = Source(self._file, whole=True)
        return unpack(self._file.description.get(key), source)

    def _state_dict(self, key: str) -> dict[str, Any]:
        saved = unpack(self._file.description[key], self._source)
        if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
            raise CheckpointError(f"is damaged: {key} is no state dict")
        return saved

    def _take_module(self, key: str, module: torch.nn.Module) -> LoadReport:
        saved = self._state_dict(key)
        own = set(names_inside(module, module.state_dict()).values())
        names = matched_names(saved, self._rename, own)
        saved = {names[name]: value for name, value in saved.items()}
        converts = self._policy.dtype != "saved"
        found = fit(key, module, saved, self._source, strict_dtype=not converts)
        self._fits.append(found)
        return found.report

    def _take_optimizer(self, optimizer: Optimizer, model: Any) -> LoadReport:
        packed = checked_optimizer(self._file.description["optimizer"])
        names = self._names(packed, optimizer, model)
        state_dict = state_dict_with(packed, self._source, names)
        misfits = kinds(optimizer, packed, names, self._policy)
        report = LoadReport(mismatched=tuple(misfits.values()))
        others = rule_differences(optimizer, packed, state_dict["param_groups"])
        if others:
            # neither its state nor its hyperparameters mean anything here
            groups = optimizer.param_groups, state_dict["param_groups"]
            matched = match(rule_of(optimizer), *groups, strict=False)
            return _joined([LoadReport(mismatched=tuple(others)), matched.report, report])
        policy = Policy(self._policy.dtype, rule_of(optimizer), deferred=True)
        try:
            loading = optimizer._prepare_load(state_dict, self._strict, policy)
        # hooks, and checks that users have written, raise whatever they like
        except Exception as error:
            raise CheckpointError(f"does not fit: {error} (nothing was loaded)") from error
        if not loading.matched.by_name:
            raise CheckpointError(
                "does not fit: a hook has taken the param_names, by which a checkpoint is matched "
                "(nothing was loaded)"
            )
        self._optimizer = optimizer, _without_misfits(optimizer, loading, misfits)
        return _joined([report, loading.report])

    def _names(self, packed: Mapping[str, Any], optimizer: Any, model: Any) -> dict[str, str]:
        """What the saved names of an optimizer mean in this one, which knows its own."""
        own = [name for group in optimizer.param_groups for name in group["param_names"]]
        return matched_names(packed["params"], self._rename, own, self._tied(model))

    def _tied(self, model: Any) -> list[list[str]]:
        """The names that mean one tensor, in the file's model and in the one that is given."""
        own = [] if model is None else aliases(unwrapped(model)).values()
        return [*own, *ties(self._file.description.get("model"), self._rename)]

    def _take_scheduler(self, scheduler: Any, model: Any) -> LoadReport:
        wrapper, scheduler = scheduler, inner_scheduler(scheduler)
        state, own = self.whole("scheduler"), scheduler.state_dict()
        saved, kind = self._file.description.get("scheduler_class"), schedules.class_of(scheduler)
        # earlier versions saved wrappers
        if saved not in (None, kind, type(wrapper).__name__):
            words = f"scheduler: the file has state of {saved}, not {kind}"
            return LoadReport(mismatched=(words,))
        matched = self._matched_groups(getattr(scheduler, "optimizer", None), model)
        self._scheduler = scheduler, state
        if matched is None:
            return LoadReport()
        self._scheduler = scheduler, schedules.regrouped(state, own, matched)
        pairs = enumerate(zip(matched.groups, scheduler.optimizer.param_groups, strict=True))
        new = [index for index, (source, group) in pairs if source is None and group["params"]]
        return LoadReport(
            missing=tuple(f"scheduler: group {i}: its parameters are not in the file" for i in new),
            mismatched=tuple(schedules.differences(state, own, matched)),
        )

    def _matched_groups(self, optimizer: Any, model: Any) -> Match | None:
        """Which saved groups those that a schedule drives are; None if there is no choice."""
        if self._optimizer is not None and self._optimizer[0] is optimizer:
            return self._optimizer[1].matched
        if not hasattr(optimizer, "param_groups") or not self._has("optimizer"):
            return None
        packed = checked_optimizer(self._file.description["optimizer"])
        if max(len(packed["groups"]), len(optimizer.param_groups)) < 2:
            return None
        try:
            with named(optimizer, model):
                names = self._names(packed, optimizer, model)
                groups = state_dict_with(packed, self._source, names)["param_groups"]
                return match(rule_of(optimizer), optimizer.param_groups, groups, strict=False)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(
                "does not fit: scheduler: it has a rate for each group, and which is whose is not "
                "known without the names of their parameters: load it in one call with model= or "
                "optimizer=, or make the optimizer from model.named_parameters() (nothing was "
                "loaded)"
            ) from error

    def _rehearse(self) -> None:
        if self._scheduler is None:
            return
        try:
            schedules.rehearse(*self._scheduler)
        except Exception as error:
            raise CheckpointError(
                f"does not fit: scheduler: {type(error).__name__}: {error} (nothing was loaded)"
            ) from error

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
        """Change everything, first what can be undone."""
        with ExitStack() as undo:
            self._commit_objects(undo)
            try:
                self._file.fill(self._overwritten())
            except Exception as error:
                # a disk that fails now: there is no memory for a second copy
                raise CheckpointError(self._half_loaded(error)) from error
            undo.pop_all()
        for found in self._fits:
            found.finish(self._source)

    def run_hooks(self) -> None:
        """Call what modules have registered for after a load.

        Raises:
            RuntimeError: one of them has raised; everything is loaded
        """
        try:
            for found in self._fits:
                found.run_hooks()
        except Exception as error:
            raise RuntimeError(
                "load: everything was loaded; then a hook of the model raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def _commit_objects(self, undo: ExitStack) -> None:
        """Run all code of others that may fail; what undoes it goes onto the stack."""
        try:
            if self._optimizer is not None:
                optimizer, loading = self._optimizer
                undo.callback(states.restorer(optimizer))
                optimizer._finish_load(loading)
            if self._scheduler is not None:
                scheduler, state = self._scheduler
                undo.callback(schedules.restorer(scheduler))
                scheduler.load_state_dict(state)
            for found in self._fits:
                found.set_states(undo)
        except Exception as error:
            raise CheckpointError(
                f"does not fit: {type(error).__name__}: {error} (nothing was loaded)"
            ) from error

    def _half_loaded(self, error: Exception) -> str:
        names = shown(sorted(self._file.touched))
        return (
            f"was whole, and could not be read once more: {error}\n  The model is half loaded. "
            "These are overwritten, wholly or in part; everything else is what it was:"
            + "".join(f"\n  {name}" for name in names)
        )


def _joined(reports: Sequence[LoadReport]) -> LoadReport:
    columns = zip(*reports, strict=True)
    return LoadReport(*(tuple(chain(*column)) for column in columns))


def _without_misfits(optimizer: Optimizer, loading: Loading, misfits: Collection[str]) -> Loading:
    """Without state of parameters that do not fit, be it saved or what they have kept for that."""
    own = optimizer.state
    saved = loading.matched.params.values()
    dropped = {
        id(param)
        for param, _, name in saved
        if name in misfits or (param in own and loading.state.get(param) is own[param])
    }
    return loading._replace(state={k: v for k, v in loading.state.items() if id(k) not in dropped})
