"""Plan: how one step is done - which parameters go together, and which back-end updates them.

A plan is made from the optimizer's groups, state and gradients, and kept while their static facts
stay the same. Making it checks everything first: what is refused is refused before anything has
changed. Loading it reads what may change from step to step: gradients, addresses, rates.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .backends import Launch, launched, log
from .cohort import PLAIN_TYPES, Cohort, Facts, Scaling, facts_of
from .hyperparameters import Hyperparameters
from .inspection import CAPTURABLE, Group, Inspection, Row
from .language import Formula, Program
from .language.number import is_fake
from .modes import is_inference
from .native.identity import checks
from .native.overlap import sharing
from .native.uploads import is_capturing
from .state import create_state
from .totals import Adder

__all__ = ["Plan", "Stepper"]


class Stepper(Protocol):
    """The interface through which an optimizer takes its steps, one after the other."""

    def load(self, scaling: Scaling) -> bool:
        """Check and read what this step needs; False if all this must be made anew."""

    def run(self) -> None:
        """Update all parameters."""

    def describe(self) -> list[str]:
        """A line per back-end: its name, and what it updates."""


class Plan:
    """The launches of one step.

    Raises:
        RuntimeError: a gradient cannot be used: sparse, of another shape or on another device
        ValueError: state that was put in by hand does not fit its parameter
    """

    def __init__(
        self,
        formula: Formula,
        groups: list[Group],
        state: dict[Tensor, dict[str, Any]],
        *,
        scaling: Scaling,
        densify: bool = False,
        sparse_only: bool = False,
        before: Plan | None = None,
        kept: list[Any],
    ) -> None:
        self._formula = formula
        self._groups = groups
        self._state = state
        self._grad_scale = scaling.grad_scale
        # which dicts they are, and what is in them
        self._own_groups, self._sizes = list(groups), list(map(len, groups))
        self._members = [list(group["params"]) for group in groups]
        self._hyperparameters = Hyperparameters(formula, groups)
        self._hyperparameters.refresh(self._grad_scale, waits=False)
        static = [formula.static({**g, "grad_scale": self._grad_scale}) for g in groups]
        self._kept = kept
        self._sparse_only = sparse_only
        self._inspection = Inspection(
            formula,
            groups,
            state,
            grad_scale=self._grad_scale,
            densify=densify,
            sparse_only=sparse_only,
            known={} if before is None else before.grad_dtypes(),
        )
        rows = self._inspection.rows()
        devices = {row.param.device for row in rows if not is_fake(row.param)}
        self._devices = {device for device in devices if device.type in CAPTURABLE}
        if any(map(is_capturing, self._devices)):
            self._refuse_to_be_captured()
        # state that is made in inference mode could not be written to outside of it
        with torch.inference_mode(False):
            cohorts = self._form_cohorts(rows, static)
            self._launches: list[Launch] = list(map(launched, cohorts))
        self._inference = is_inference(row.param for row in rows)
        self._waits = not all(launch.stays_on_device for launch in self._launches)
        self._skips = False
        placed = {id(row.param) for row in rows}
        params = [param for members in self._members for param in members]
        self._without_grad = [param for param in params if id(param) not in placed]
        # whose state is whose
        self._keys, self._held = list(state), list(state.values())
        self._same = checks((groups, *(group["params"] for group in groups)), state)
        self._adder = Adder(len(groups), self._kept)
        self._totals = max((len(cohort.program.totals) for cohort in cohorts), default=0)
        if log.isEnabledFor(logging.DEBUG):
            for line in self.describe():
                log.debug("%s: %s", formula.name, line)

    # Forming cohorts

    def _form_cohorts(self, rows: list[Row], static: Sequence[Any]) -> list[Cohort]:
        aliased = self._prepare_state(rows)
        cohorts: dict[tuple[Program, Facts, bool, bool], Cohort] = {}
        for row, shared in zip(rows, aliased.tolist(), strict=True):
            group, state, grad = self._groups[row.group], self._state_of(row), row.param.grad
            grad = row.param.detach() if grad is None else grad
            leaves_rows_out = row.program.is_idle or self._sparse_only
            densify = grad.layout is torch.sparse_coo and not leaves_rows_out
            pair = (row.param, grad.to_dense() if densify else grad)
            facts = facts_of(row.program, static[row.group], pair, state, group)
            key = (row.program, facts, shared, densify)
            if key not in cohorts:
                cohorts[key] = Cohort(
                    row.program, facts, self._hyperparameters, shared, densify, kept=self._kept
                )
            cohorts[key].params.append(row.param)
            cohorts[key].states.append(state)
            cohorts[key].group_indices.append(row.group)
        return list(cohorts.values())

    def _state_of(self, row: Row) -> dict[str, Any]:
        """The state of a parameter; one that needs none gets no entry in the optimizer's."""
        find = self._state.setdefault if row.program.slots else self._state.get
        return find(row.param, {})

    def _prepare_state(self, rows: list[Row]) -> npt.NDArray[np.bool_]:
        """Create what is missing, move what lies elsewhere; which rows share memory."""
        written: list[Tensor] = []
        read: list[Tensor] = []
        writers: list[int] = []
        readers: list[int] = []
        for index, row in enumerate(rows):
            param, grad, state = row.param, row.param.grad, self._state_of(row)
            state.update(create_state(row.program, self._groups[row.group], param, state))
            own = filter(_has_memory, (param, *(state[n] for n in row.program.slots if n in state)))
            written += own
            writers += [index] * (len(written) - len(writers))
            if grad is not None and _has_memory(grad) and not _is_same_memory(grad, param):
                read.append(grad)
                readers.append(index)
        aliased = np.zeros(len(rows), bool)
        aliased[np.array([*writers, *readers], np.int64)[sharing(written, read)]] = True
        return aliased

    # Step after step

    def load(self, scaling: Scaling) -> bool:
        """Read what this step needs; False if the plan no longer fits and must be made anew.

        Raises:
            RuntimeError: the step is being captured into a graph, which would not repeat it
        """
        if (scaling.grad_scale is None) is not (self._grad_scale is None):
            return False
        if self._devices:
            self._check_captures(scaling)
        scale = scaling.grad_scale
        if not (self._same_members() and self._hyperparameters.refresh(scale, waits=self._waits)):
            return False
        if not self._same.entries(self._state, self._keys, self._held):
            return False
        for param in self._without_grad:
            if param.grad is not None:
                return False
        for launch in self._launches:
            if not launch.load(scaling):
                return False
        # a launch that stays on the device finds out there
        self._skips = self._waits and _is_set(scaling.found_inf)
        return True

    def _check_captures(self, scaling: Scaling) -> None:
        capturing = {device for device in self._devices if is_capturing(device)}
        for device in capturing:
            self._inspection.check_capturable(device)
        if not capturing:
            return
        name = self._formula.name
        if capturing != self._devices:
            here = ", ".join(map(str, capturing))
            there = ", ".join(map(str, self._devices - capturing))
            raise RuntimeError(
                f"{name}: a graph is captured on {here}, but parameters lie on {there} too, where "
                "the step would not be repeated; use an optimizer for each device"
            )
        numbers = self._hyperparameters.has_some_elsewhere() or any(v is not None for v in scaling)
        if self._waits and numbers:
            backends = {line.partition(":")[0] for line in self.describe()}
            raise RuntimeError(
                f"{name}: a step on {', '.join(sorted(backends))} reads numbers back from the "
                "device, which a graph cannot repeat; leave foreach and fused unset, and the "
                "parameters dense"
            )

    def _refuse_to_be_captured(self) -> None:
        """Tables and state that are made in a capture would be there only after a replay."""
        for device in self._devices:
            if is_capturing(device):
                self._inspection.check_capturable(device)
        raise RuntimeError(
            f"{self._formula.name}: something about this step is new (state, groups or gradients), "
            "and what is made for it in a capture would be made anew at every replay; take one "
            "more step like this before the capture"
        )

    def _same_members(self) -> bool:
        own, sizes, members = self._own_groups, self._sizes, self._members
        return bool(self._same.groups(self._groups, own, sizes, "params", members))

    def run(self) -> None:
        """Update all parameters."""
        if self._skips:
            return
        if torch.is_inference_mode_enabled() is not self._inference:
            with torch.inference_mode(self._inference):
                self.run()
            return
        found: list[Any] = []
        while len(found) < self._totals:
            found.append(self._adder.add(self._launches, found))
        for launch in self._launches:
            launch.run(found)

    def grad_dtypes(self) -> dict[int, torch.dtype]:
        """The dtype of the gradients of each parameter that this plan updates, by id."""
        cohorts = [launch.cohort for launch in self._launches]
        return {id(p): cohort.facts.grad_dtype for cohort in cohorts for p in cohort.params}

    def describe(self) -> list[str]:
        """A line per launch: its back-end and what it updates."""
        return [_described(launch) for launch in self._launches]


def _is_set(found_inf: Any) -> bool:
    if isinstance(found_inf, Tensor) and is_fake(found_inf):
        return False
    return bool(found_inf)


def _has_memory(tensor: Tensor) -> bool:
    """Return whether the tensor's values are the memory at its address."""
    return type(tensor) in PLAIN_TYPES and tensor.layout is torch.strided


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether both tensors have each element at the same place in memory."""
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype is b.dtype


def _described(launch: Launch) -> str:
    cohort = launch.cohort
    facts = cohort.facts
    name = type(launch).__module__.rpartition(".")[2]
    return f"{name}: {len(cohort.params)} x {facts.param_dtype} on {facts.device}, {facts.layout}"
