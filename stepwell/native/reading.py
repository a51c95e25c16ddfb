"""Reading: where the tensors of a cohort lie in memory, looked up afresh at every step.

Native code works with addresses. Whatever a user does between two steps (`p.data = ...`, new
gradients, loaded state) is either seen here, or makes the cohort's facts untrue.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cohort import Cohort, Facts, local_part, state_shape
from ..language import Program
from ..language.expr import ALONG, REDUCTIONS
from . import llvm, tensors
from .overlap import overlapping
from .schedule import Schedule

__all__ = ["Reading", "dtypes_of", "slots_of", "unreadable"]

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
"""The dtype of the pairs that complex numbers are."""


ACROSS_PARTS = REDUCTIONS | ALONG | {"extent", "numel"}
"""What is not known of a parameter of which only a part is here."""

FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def dtypes_of(facts: Facts) -> set[torch.dtype]:
    """The real dtypes that occur in a cohort."""
    found = {facts.param_dtype, facts.grad_dtype, *facts.state_dtypes}
    return {REAL.get(dtype, dtype) for dtype in found}


def unreadable(
    program: Program, facts: Facts, layouts: tuple[str, ...] = ("dense", "sharded")
) -> str | None:
    """Why native code for these layouts could not work with such parameters, or None."""
    if facts.layout not in layouts:
        return f"{facts.layout} memory"
    if facts.layout == "sharded" and not program.ops.isdisjoint(ACROSS_PARTS):
        return "a reduction over parts that lie elsewhere"
    if strange := dtypes_of(facts) - FLOATS:
        return f"dtype {', '.join(map(str, strange))}"
    if facts.param_dtype.is_complex != facts.grad_dtype.is_complex:
        return "a gradient that is not as complex as its parameter"
    if not tensors.is_available():
        return "this torch has no DLPack exchange interface"
    return llvm.unusable()


def slots_of(cohort: Cohort) -> dict[str, torch.dtype]:
    """The real dtype of each slot that the program of a cohort reads or writes."""
    facts, program = cohort.facts, cohort.program
    present = [name for name in program.slots if name not in facts.absent]
    dtypes = {
        "param": facts.param_dtype,
        "grad": facts.grad_dtype,
        **dict(zip(present, facts.state_dtypes, strict=True)),
        **dict.fromkeys(facts.absent, facts.param_dtype),
    }
    read = {str(node.value) for node in program.nodes if node.op == "state"}
    used = {"param", "grad"} | read | program.outputs.keys()
    return {name: REAL.get(dtype, dtype) for name, dtype in dtypes.items() if name in used}


class Reading:
    """The addresses of a cohort's tensors.

    Attributes:
        sizes: how many real numbers each parameter has
        addresses: a row per slot of the schedule, a column per parameter
    """

    def __init__(self, cohort: Cohort, schedule: Schedule) -> None:
        self.cohort = cohort
        self._keys = schedule.slots[1:-1]
        self._is_sharded = cohort.facts.layout == "sharded"
        self._rewrites_grad = "grad" in schedule.program.outputs
        absent = sorted(cohort.facts.absent & schedule.dtypes.keys())
        self._fresh = {n: [torch.empty_like(p).detach() for p in cohort.params] for n in absent}
        _bring_to_layout(cohort)
        self._states = [
            {**state, **{name: values[row] for name, values in self._fresh.items()}}
            if self._fresh
            else state
            for row, state in enumerate(cohort.states)
        ]
        factor = 2 if cohort.facts.param_dtype.is_complex else 1
        numels = [factor * local_part(param).numel() for param in cohort.params]
        self.sizes: npt.NDArray[np.int64] = np.array(numels, np.int64)
        self.addresses: npt.NDArray[np.int64] = np.zeros(
            (len(schedule.slots), len(cohort.params)), np.int64
        )
        # what is written, and how many bytes of it: each slot but the gradient, by row
        self._starts = self.addresses[:-1]
        self._written_sizes = np.array(
            [schedule.dtypes[n].itemsize * self._sizes_of(n) for n in schedule.slots[:-1]]
        )
        self._odd: list[int] = []
        self._grads: list[Any] | None = None
        self._found = tensors.DIFFERS
        self._reader: tensors.Reader | None = None
        self._spent = False
        self._written = b""

    def _sizes_of(self, name: str) -> npt.NDArray[np.int64]:
        """How many real numbers a slot has, by row."""
        slot = self.cohort.program.slots.get(name)
        if slot is None or slot.is_whole:
            return self.sizes
        counts = [math.prod(state_shape(slot, param)) for param in self.cohort.params]
        return np.array(counts, np.int64)

    def has_gradient(self, row: int) -> bool:
        """Whether a parameter has a gradient in this step."""
        return bool(self.addresses[-1, row] != tensors.NO_GRADIENT)

    def load(self, _: object = None) -> bool:
        """Read all addresses; False if the cohort's facts are no longer true."""
        if self._spent:
            return False
        if self._is_sharded:
            return self._load_shards()
        reader = self._reader
        if reader is None:
            reader = self._first_look()
        self._grads = None
        if self._odd or self.cohort.densify:
            return self._load_copies(reader)
        self._found = reader.read(self.cohort.params, self._states)
        if self._found == tensors.TURNED:
            return self._load_copies(reader)
        return self._found != tensors.DIFFERS and self._is_apart()

    def _load_copies(self, reader: tensors.Reader) -> bool:
        """Read gradients that have to be brought to the parameters' order of memory first."""
        grads = self.cohort.gradients()
        if any(grad is not None and grad.layout is not torch.strided for grad in grads):
            return False
        self._grads = self._at_layout(grads)
        self._found = reader.read(self.cohort.params, self._states, self._grads)
        return self._found in (tensors.SAME, tensors.PARTLY) and self._is_apart()

    def _load_shards(self) -> bool:
        """Read the parts of distributed tensors that lie on this device."""
        cohort = self.cohort
        if not cohort.is_sharded():
            return False
        params = [local_part(param) for param in cohort.params]
        states = [{key: local_part(state[key]) for key in self._keys} for state in self._states]
        grads = [None if g is None else local_part(g) for g in cohort.gradients()]
        if self._reader is None:
            likes = [p if g is None else g for p, g in zip(params, grads, strict=True)]
            self._reader = tensors.Reader(params, states, self._keys, likes, self.addresses)
        self._found = self._reader.read(params, states, grads)
        return self._found in (tensors.SAME, tensors.PARTLY) and self._is_apart()

    def _first_look(self) -> tensors.Reader:
        params = self.cohort.params
        # where there is no gradient yet it is expected to be like the parameter
        pairs = list(zip(params, self.cohort.gradients(), strict=True))
        grads = [param.detach() if grad is None else grad for param, grad in pairs]
        self._odd = [i for i, param in enumerate(params) if grads[i].stride() != param.stride()]
        self._reader = tensors.Reader(
            params, self._states, self._keys, self._at_layout(grads), self.addresses
        )
        return self._reader

    def _at_layout(self, grads: list[Any]) -> list[Any]:
        grads = [g if g is None else g.resolve_conj().resolve_neg() for g in grads]
        for i in self._odd:
            param, grad = self.cohort.params[i], grads[i]
            if grad is None or grad.shape != param.shape or grad.stride() == param.stride():
                continue
            grads[i] = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        return grads

    def _is_apart(self) -> bool:
        """Whether what is written shares no memory; worked out again when something has moved."""
        now = self._starts.tobytes()
        if now == self._written:
            return True
        ends = self._starts + self._written_sizes
        apart = not overlapping(self._starts.ravel(), ends.ravel()).any()
        self._written = now if apart else b""
        return apart

    def finish(self) -> None:
        """After the update: the tensors have changed, and state that was made now is there."""
        params = self.cohort.params
        if self._found == tensors.PARTLY:
            params = [param for row, param in enumerate(params) if self.has_gradient(row)]
        torch.autograd.graph.increment_version(params)
        for name, values in self._fresh.items():
            self._spent = True
            for state, value in zip(self.cohort.states, values, strict=True):
                state[name] = value
        if self._grads is not None:
            if self._rewrites_grad:
                for param, used in zip(self.cohort.params, self._grads, strict=True):
                    param.grad = used
            self._grads = None


def _bring_to_layout(cohort: Cohort) -> None:
    """Give state that lies in another order of memory than its parameter the same order."""
    slots = cohort.program.slots
    names = [name for name in cohort.program.element_slots if slots[name].is_whole]
    for param, state in zip(cohort.params, cohort.states, strict=True):
        for name in names:
            value: Tensor | None = state.get(name)
            if value is not None and value.stride() != param.stride():
                state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)
