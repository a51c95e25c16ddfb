"""Plan: how one step is done - which parameters go together, and which back-end updates them.

A plan is made from the optimizer's groups, state and gradients, and kept while their static facts
stay the same. Making it checks everything first: what is refused is refused before anything has
changed. Loading it reads what may change from step to step: gradients, addresses, rates.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .backends import Launch, choose, log
from .cohort import (
    PLAIN_TYPES,
    Cohort,
    Facts,
    Hyperparameters,
    Scaling,
    facts_of,
    is_unfit,
    keeps_numbers_on_device,
    state_shape,
)
from .language import Formula, Program
from .language.fields import Slot
from .language.program import program_for
from .native import tensors
from .native.uploads import is_capturing, upload

__all__ = ["Plan", "create_state"]

# where a graph of work can be captured, in torch's order
CAPTURABLE = ("cuda", "xpu", "hpu", torch._C._get_privateuse1_backend_name(), "xla")

Group = dict[str, Any]


def create_state(
    program: Program, group: Mapping[str, Any], param: Tensor, have: Mapping[str, Any] = {}
) -> dict[str, Tensor]:
    """The state of a parameter that is not there yet, or not as a tensor on the right device.

    What starts unset is left out.
    """
    made: dict[str, Tensor] = {}
    on_device = keeps_numbers_on_device(program, group)
    for name, slot in program.slots.items():
        value = have.get(name)
        home = param.device if on_device or not slot.scalar else torch.device("cpu")
        if isinstance(value, Tensor):
            if value.device != home:
                made[name] = value.to(home)
        elif slot.initial == "param":
            made[name] = param.detach().clone(memory_format=torch.preserve_format)
        elif slot.scalar:
            number = _initial(slot, group) if value is None else float(value)
            made[name] = torch.tensor(number, dtype=_scalar_dtype(), device=home)
        elif slot.initial is not None:
            made[name] = _filled(param, state_shape(slot, param), _initial(slot, group))
    return made


def _initial(slot: Slot, group: Mapping[str, Any]) -> float:
    initial = slot.initial
    return float(group[initial] if isinstance(initial, str) else initial or 0)


def _filled(param: Tensor, shape: torch.Size, value: float) -> Tensor:
    with torch.no_grad():
        if shape != param.shape:
            like = param.new_empty(shape)
        else:
            like = torch.empty_like(param, memory_format=torch.preserve_format)
        # the gradient's real and imaginary parts are numbers of their own
        like = like.detach()
        (torch.view_as_real(like) if like.is_complex() else like).fill_(value)
    return like


def _scalar_dtype() -> torch.dtype:
    # as torch: a count in float32 unless the whole session is in float64
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32


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
        before: Plan | None = None,
    ) -> None:
        self._formula = formula
        self._groups = groups
        self._state = state
        self._densify = densify
        self._grad_scale = scaling.grad_scale
        self._params = [param for group in groups for param in group["params"]]
        self._sizes = [len(group["params"]) for group in groups]
        self._hyperparameters = Hyperparameters(formula, groups)
        self._hyperparameters.refresh(self._grad_scale, waits=False)
        static = [formula.static({**g, "grad_scale": self._grad_scale}) for g in groups]
        # parameters that were stepped before keep their place while they have no gradient, so that
        # gradients may come and go
        self._known = {} if before is None else before.grad_dtypes()
        # what captured graphs read outlives the plan that they were captured from
        self._kept: list[Any] = [] if before is None else before._kept
        rows = self._check()
        self._check_first_capture(rows)
        # what is made in inference mode could not be written to outside of it
        with torch.inference_mode(False):
            cohorts = self._form_cohorts(rows, static)
            self._launches: list[Launch] = [choose(cohort).launch(cohort) for cohort in cohorts]
        self._waits = not all(launch.stays_on_device for launch in self._launches)
        self._skips = False
        self._devices = {c.facts.device for c in cohorts if c.facts.device.type in CAPTURABLE}
        placed = {id(row.param) for row in rows}
        self._without_grad = [param for param in self._params if id(param) not in placed]
        # whose state is whose
        self._keys, self._held = list(state), list(state.values())
        self._members: dict[int, Tensor] = {}
        self._totals = max((len(cohort.program.totals) for cohort in cohorts), default=0)
        if log.isEnabledFor(logging.DEBUG):
            for line in self.describe():
                log.debug("%s: %s", formula.name, line)

    def _check(self) -> list[_Row]:
        """The parameters that this plan updates, or a refusal; nothing is changed."""
        rows = []
        programs: dict[Any, Program] = {}
        for index, group in enumerate(self._groups):
            whole = programs.setdefault(index, self._program(group, frozenset()))
            for number, param in enumerate(group["params"]):
                have = self._state.get(param, {})
                if param.grad is None and not self._keeps_place(param, whole, have):
                    continue
                absent = frozenset(
                    n for n, s in whole.slots.items() if s.initial is None and _lacks(have, n)
                )
                if (index, absent) not in programs:
                    programs[index, absent] = self._program(group, absent)
                row = _Row(index, number, param, programs[index, absent])
                self._check_row(row, group, have)
                rows.append(row)
        self._check_totals({row.program for row in rows})
        return rows

    def _check_totals(self, programs: set[Program]) -> None:
        """The first total over all parameters must be the same sum for each of them, and so on."""
        asked = {
            tuple((i, n.op) for i, n in enumerate(program.totals) if n.value == "all")
            for program in programs
        }
        if len(asked - {()}) > 1:
            raise RuntimeError(
                f"{self._formula.name}: its groups ask for different totals with across='all', "
                "which cannot be added up; give them the same flags, or ask in the same order"
            )

    def _keeps_place(self, param: Tensor, program: Program, have: Any) -> bool:
        known = self._known.get(id(param)) is param.dtype
        return known and not any(_lacks(have, name) for name in program.slots)

    def grad_dtypes(self) -> dict[int, torch.dtype]:
        """The dtype of the gradients of each parameter that this plan updates, by id."""
        cohorts = [launch.cohort for launch in self._launches]
        return {id(p): cohort.facts.grad_dtype for cohort in cohorts for p in cohort.params}

    def _program(self, group: Group, absent: frozenset[str]) -> Program:
        return program_for(self._formula, {**group, "grad_scale": self._grad_scale}, absent)

    def _check_row(self, row: _Row, group: Group, have: Any) -> None:
        param, name = row.param, self._formula.name
        if not isinstance(have, dict):
            raise TypeError(
                f"{name}: the state of {self._where(row)} must be a dict, got {type(have).__name__}"
            )
        if not (param.is_floating_point() or param.is_complex()):
            raise RuntimeError(
                f"{name} updates floating point and complex parameters, got {param.dtype} "
                f"({self._where(row)}): leave it out of the optimizer"
            )
        if group.get("capturable") and param.device.type not in CAPTURABLE:
            raise AssertionError(
                "If capturable=True, params and state_steps must be on supported devices: "
                f"{list(CAPTURABLE)}. ({name}, {self._where(row)} is on {param.device}: "
                "leave capturable=False)"
            )
        if _is_expanded(param):
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to "
                "a single memory location. Please clone() the tensor before performing the "
                f"operation. ({name}: {self._where(row)} is expanded)"
            )
        if group.get("differentiable") and param.is_leaf and param.requires_grad:
            raise RuntimeError(
                "a leaf Variable that requires grad is being used in an in-place operation. "
                f"({name}, {self._where(row)}: differentiable=True steps a clone of the parameter)"
            )
        self._check_state(row, have)
        if param.grad is not None:
            self._check_grad(row, param, param.grad)

    def _check_grad(self, row: _Row, param: Tensor, grad: Tensor) -> None:
        name = self._formula.name
        if grad.shape != param.shape or grad.device != param.device:
            raise RuntimeError(
                f"{name}: the gradient of {self._where(row)} has shape {tuple(grad.shape)} on "
                f"{grad.device}, its parameter {tuple(param.shape)} on {param.device}; was the "
                "parameter replaced after backward()? Call zero_grad() and backward() again"
            )
        if grad.is_complex() != param.is_complex():
            raise RuntimeError(
                f"{name}: the gradient of {self._where(row)} is {grad.dtype}, its parameter "
                f"{param.dtype}: one is complex, the other is not"
            )
        if grad.layout is not torch.strided:
            self._check_sparse(row, grad)

    def _check_state(self, row: _Row, have: Mapping[str, Any]) -> None:
        param, name = row.param, self._formula.name
        for key, slot in row.program.slots.items():
            value = have.get(key)
            ndim = max(param.dim(), 1)
            if slot.over is not None and not -ndim <= slot.over < ndim:
                raise RuntimeError(
                    f"{name}: state {key!r} has size 1 in dimension {slot.over}, which "
                    f"{self._where(row)} of shape {tuple(param.shape)} does not have"
                )
            if isinstance(value, Tensor) and value.layout is not torch.strided:
                raise ValueError(
                    f"{name}: state[{key!r}] of {self._where(row)} has layout {value.layout}; "
                    "make it dense: .to_dense()"
                )
            if isinstance(value, Tensor) and is_unfit(slot, param, value.to(param.device)):
                raise ValueError(
                    f"{name}: state[{key!r}] of {self._where(row)} has shape {tuple(value.shape)}, "
                    f"expected {tuple(state_shape(slot, param))}"
                )

    def _check_sparse(self, row: _Row, grad: Tensor) -> None:
        if grad.layout is torch.sparse_coo and (row.program.is_idle or self._densify):
            return
        raise RuntimeError(
            f"{self._formula.name} does not support sparse gradients, please consider SparseAdam "
            f"instead ({self._where(row)} has a gradient of layout {grad.layout}; or make the "
            "gradient dense: sparse=False in torch.nn.Embedding)"
        )

    def _where(self, row: _Row) -> str:
        names = self._groups[row.group].get("param_names")
        which = repr(names[row.number]) if names else str(row.number)
        return f"group {row.group}, parameter {which}"

    # Forming cohorts

    def _form_cohorts(self, rows: list[_Row], static: Sequence[Any]) -> list[Cohort]:
        aliased = self._prepare_state(rows)
        cohorts: dict[tuple[Facts, bool, bool], Cohort] = {}
        for row, shared in zip(rows, aliased.tolist(), strict=True):
            group, state, grad = self._groups[row.group], self._state[row.param], row.param.grad
            grad = row.param.detach() if grad is None else grad
            densify = grad.layout is torch.sparse_coo and not row.program.is_idle
            pair = (row.param, grad.to_dense() if densify else grad)
            facts = facts_of(row.program, static[row.group], pair, state, group)
            key = (facts, shared, densify)
            if key not in cohorts:
                cohorts[key] = Cohort(
                    row.program, facts, self._hyperparameters, shared, densify, kept=self._kept
                )
            cohorts[key].params.append(row.param)
            cohorts[key].states.append(state)
            cohorts[key].group_indices.append(row.group)
        return list(cohorts.values())

    def _prepare_state(self, rows: list[_Row]) -> npt.NDArray[np.bool_]:
        """Create what is missing, move what lies elsewhere; which rows share memory."""
        starts, ends, owners = [], [], []
        for index, row in enumerate(rows):
            state = self._state[row.param]
            state.update(create_state(row.program, self._groups[row.group], row.param, state))
            for tensor in (row.param, *(state[n] for n in row.program.slots if n in state)):
                if type(tensor) in PLAIN_TYPES and tensor.layout is torch.strided:
                    starts.append(tensor.data_ptr())
                    ends.append(tensor.data_ptr() + tensor.numel() * tensor.element_size())
                    owners.append(index)
        shared = tensors.overlapping(np.array(starts, np.int64), np.array(ends, np.int64))
        aliased = np.zeros(len(rows), bool)
        aliased[np.array(owners, np.int64)[shared]] = True
        return aliased

    # Step after step

    def load(self, scaling: Scaling) -> bool:
        """Read what this step needs; False if the plan no longer fits and must be made anew.

        Raises:
            RuntimeError: the step is being captured into a graph, which would not repeat it
        """
        if (scaling.grad_scale is None) is not (self._grad_scale is None):
            return False
        scale = scaling.grad_scale
        if not (self._same_members() and self._hyperparameters.refresh(scale, waits=self._waits)):
            return False
        # whose state is whose, in a form in which nothing is hashed: that is a call into Python
        state = self._state
        if not (
            len(state) == len(self._keys)
            and all(map(is_, state, self._keys))
            and all(map(is_, state.values(), self._held))
        ):
            return False
        for param in self._without_grad:
            if param.grad is not None:
                return False
        for launch in self._launches:
            if not launch.load(scaling):
                return False
        for device in self._devices:
            if is_capturing(device):
                self._check_capture(device)
        # a device that is told to skip finds out by itself
        # a launch that stays on the device finds out there
        self._skips = self._waits and bool(scaling.found_inf)
        return True

    def _check_first_capture(self, rows: list[_Row]) -> None:
        """State that is made in a capture would be made anew at every replay."""
        for row in rows:
            lacking = [n for n in row.program.slots if _lacks(self._state.get(row.param, {}), n)]
            if lacking and row.param.device.type in CAPTURABLE and is_capturing(row.param.device):
                raise RuntimeError(
                    f"{self._formula.name}: {self._where(row)} has no state yet ({lacking[0]}), "
                    "and a graph would make it anew at every replay; take a step before the capture"
                )

    def _check_capture(self, device: torch.device) -> None:
        """A graph repeats what the device did; what the host did would stay as it is now."""
        words = (
            f"Attempting {device.type.upper()} graph capture of step() for an instance of "
            f"{self._formula.name} but param_groups' capturable is False."
        )
        if any(group.get("capturable") is False for group in self._groups):
            raise RuntimeError(f"{words} (set capturable=True, and take a step before the capture)")
        for launch in self._launches:
            cohort = launch.cohort
            if cohort.program.scalar_slots and not cohort.facts.on_device:
                raise RuntimeError(
                    f"{words} ({self._formula.name} counts its steps on the host: set fused=True, "
                    "and take a step before the capture)"
                )

    def _same_members(self) -> bool:
        groups = self._groups
        if len(groups) == 1:
            params = groups[0]["params"]
            return len(params) == len(self._params) and all(map(is_, params, self._params))
        params = []
        for group, size in zip(groups, self._sizes, strict=False):
            members = group["params"]
            if len(members) != size:
                return False
            params += members
        return len(groups) == len(self._sizes) and all(map(is_, params, self._params))

    def run(self) -> None:
        """Update all parameters."""
        if self._skips:
            return
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                self.run()
            return
        found: list[Any] = []
        while len(found) < self._totals:
            found.append(self._total([launch.shares(found) for launch in self._launches], found))
        for launch in self._launches:
            launch.run(found)

    def _total(self, shares: list[Any], found: list[Any]) -> Any:
        """The next total: a number by group, or a tensor if all shares are tensors.

        Either way it does not depend on how parameters are ordered and grouped: the sum of host
        numbers is exact, those on a device are sorted first.
        """
        launches = [
            launch for launch, share in zip(self._launches, shares, strict=True) if len(share)
        ]
        shares = [share for share in shares if len(share)]
        if all(isinstance(share, Tensor) for share in shares):
            members = self._members_of_totals(launches, len(found))
            device = shares[0].device
            together = torch.cat([share.to(device, non_blocking=True) for share in shares])
            padded = torch.nn.functional.pad(together, (0, 1))
            # in the order of size, so that the order of the parameters is not part of the result
            return padded[members].sort(dim=1).values.sum(dim=1)
        by_key: defaultdict[int | None, list[float]] = defaultdict(list)
        for launch, share in zip(launches, shares, strict=True):
            pairs = share
            if isinstance(share, Tensor):
                keys = _total_keys(launch.cohort, len(found))
                pairs = zip(keys, share.tolist(), strict=True)
            for key, value in pairs:
                by_key[key].append(value)
        return {key: math.fsum(values) for key, values in by_key.items()}

    def _members_of_totals(self, launches: list[Launch], number: int) -> Tensor:
        """Which shares add up: a row per group, and one for all; past the end stands for none."""
        if number not in self._members:
            rows: list[list[int]] = [[] for _ in range(len(self._groups) + 1)]
            keys = [key for launch in launches for key in _total_keys(launch.cohort, number)]
            for index, key in enumerate(keys):
                rows[-1 if key is None else key].append(index)
            table = np.full((len(rows), max(map(len, rows))), len(keys), np.int64)
            for row, members in zip(table, rows, strict=True):
                row[: len(members)] = members
            device = launches[0].cohort.facts.device
            self._members[number] = upload(table, device, self._kept)
        return self._members[number]

    def describe(self) -> list[str]:
        """A line per launch: its back-end and what it updates."""
        return [_described(launch) for launch in self._launches]


def _total_keys(cohort: Cohort, number: int) -> list[int | None]:
    """What each parameter adds to: its group, or None for all parameters."""
    if cohort.program.totals[number].value == "all":
        return [None] * len(cohort.params)
    return list(cohort.group_indices)


def _lacks(state: Any, name: str) -> bool:
    return not isinstance(state, dict) or state.get(name) is None


def _is_expanded(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or not tensor.numel():
        return False
    return any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


class _Row(NamedTuple):
    """A parameter, its group, and its number in the group."""

    group: int
    number: int
    param: Tensor
    program: Program


def _described(launch: Launch) -> str:
    cohort = launch.cohort
    facts = cohort.facts
    name = type(launch).__module__.rpartition(".")[2]
    return f"{name}: {len(cohort.params)} x {facts.param_dtype} on {facts.device}, {facts.layout}"
