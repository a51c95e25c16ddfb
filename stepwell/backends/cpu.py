"""Native code for the processor: one pass over memory, one call for all tensors of a cohort."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cohort import Cohort, Facts
from ..language import Program
from ..native import llvm, openmp, tensors
from ..native.assembly import CONTEXT, MEMORY
from ..native.lowering import SUPPORTED, Kernel, lower

NAME = "cpu"

# Elements per block. A block of every slot of AdamW in float32 fits into an L2 cache; the size is
# part of the result of a reduction, so it is the same everywhere.
BLOCK = 16384
# Waking a thread costs about as much as this many elements.
GRAIN = 16384

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def refuses(program: Program, facts: Facts) -> str | None:
    """Why this cohort cannot run here, or None."""
    missing = program.ops - SUPPORTED
    if missing:
        return f"no operation {', '.join(sorted(missing))}"
    if facts.device.type != "cpu" or facts.layout != "dense":
        return f"{facts.layout} memory on {facts.device}"
    dtypes = {facts.param_dtype, facts.grad_dtype, *facts.state_dtypes}
    strange = {dtype for dtype in dtypes if REAL.get(dtype, dtype) not in MEMORY}
    if strange:
        return f"dtype {', '.join(map(str, strange))}"
    if facts.param_dtype.is_complex != facts.grad_dtype.is_complex:
        return "a gradient that is not as complex as its parameter"
    if torch.float16 in dtypes and llvm.features().isdisjoint({"f16c", "neon"}):
        return "no conversion of float16 in this processor"
    if not tensors.is_available():
        return "this torch has no DLPack exchange interface"
    return None


@cache
def _compiled(
    program: Program, dtypes: tuple[tuple[str, torch.dtype], ...]
) -> tuple[Kernel, llvm.Library, Any]:
    kernel = lower(program, dict(dtypes), openmp.runtime())
    library = llvm.load(kernel.ir)
    # a CFUNCTYPE gives the interpreter's lock away while it runs
    signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return kernel, library, signature(library.address("run"))


class Launch:
    """The tables of a cohort, and the compiled program that works through them."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        dtypes, self._fresh = _slots_of(cohort)
        self.kernel, self._library, self._call = _compiled(cohort.program, tuple(dtypes.items()))
        self._dtypes = {name: dtypes[name] for name in self.kernel.slots}
        _bring_to_layout(cohort)
        self._states = [
            {**state, **{name: values[row] for name, values in self._fresh.items()}}
            if self._fresh
            else state
            for row, state in enumerate(cohort.states)
        ]
        self._odd: list[int] = []
        self._grads: list[Any] | None = None
        self._found = tensors.DIFFERS
        self._reader: tensors.Reader | None = None
        self._spent = False
        self._make_tables()

    def _make_tables(self) -> None:
        cohort, kernel = self.cohort, self.kernel
        factor = 2 if cohort.facts.param_dtype.is_complex else 1
        sizes = np.array([factor * param.numel() for param in cohort.params], np.int64)
        blocks, first = _blocks(sizes)
        width = max(len(kernel.reduced), 1)
        double = cohort.facts.param_dtype in (torch.float64, torch.complex128)
        self._work = np.concatenate([[0], np.cumsum(blocks[:, 2] + 64)])
        self._tables: dict[str, npt.NDArray[Any]] = {
            "hyperparameters": cohort.hyperparameters.table,
            "groups": np.array(cohort.group_indices, np.int64),
            "numbers": np.zeros((len(sizes), kernel.columns), np.float64 if double else np.float32),
            "blocks": blocks,
            "partials": np.zeros((len(blocks), width)),
            "reductions": np.zeros((len(sizes), width)),
            "first_block": first,
            "numels": sizes.astype(np.float64),
        }
        self._most_threads = max(1, int(sizes.sum()) // GRAIN)
        self._context = np.zeros(len(CONTEXT), np.int64)
        self._context[CONTEXT.index("rows")] = len(sizes)
        for name, table in self._tables.items():
            self._context[CONTEXT.index(name)] = table.ctypes.data
        self._context_address = self._context.ctypes.data
        self._threads = 0
        self._written = b""
        # bytes of each slot but the gradient, by row
        self._written_sizes = np.array(
            [
                MEMORY[dtype].size * (np.ones_like(sizes) if name in kernel.scalars else sizes)
                for name, dtype in self._dtypes.items()
                if name != "grad"
            ]
        )

    def load(self, grad_scale: float | None) -> bool:
        """Read all addresses; False if the cohort's facts are no longer true."""
        if self._spent:
            return False
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

    def _first_look(self) -> tensors.Reader:
        params = self.cohort.params
        # where there is no gradient yet it is expected to be like the parameter
        pairs = list(zip(params, self.cohort.gradients(), strict=True))
        grads = [param.detach() if grad is None else grad for param, grad in pairs]
        self._odd = [i for i, param in enumerate(params) if grads[i].stride() != param.stride()]
        keys = self.kernel.slots[1:-1]
        self._reader = tensors.Reader(params, self._states, keys, self._at_layout(grads))
        addresses = self._reader.addresses
        self._context[CONTEXT.index("addresses")] = addresses.ctypes.data
        self._written_addresses = addresses[:-1]
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
        starts = self._written_addresses
        if starts.tobytes() == self._written:
            return True
        ends = starts + self._written_sizes
        apart = not tensors.overlapping(starts.ravel(), ends.ravel()).any()
        self._written = starts.tobytes() if apart else b""
        return apart

    def shares(self, found: Sequence[Mapping[Any, float]]) -> list[tuple[int | None, float]]:
        """Run the sweeps that the next total needs; what each parameter adds to it."""
        if len(found) >= len(self.kernel.totals):
            return []
        node = self.kernel.totals[len(found)]
        if node.op == "numel":
            values = self._tables["numels"].tolist()
        else:
            self._sweep_with(found, range(self.kernel.passes[node]))
            values = self._tables["reductions"][:, self.kernel.reduced[node]].tolist()
        groups = self.cohort.group_indices
        keys = [None if node.value == "all" else group for group in groups]
        pairs = enumerate(zip(keys, values, strict=True))
        return [pair for row, pair in pairs if self._has_gradient(row)]

    def _has_gradient(self, row: int) -> bool:
        assert self._reader is not None
        return bool(self._reader.addresses[-1, row] != tensors.NO_GRADIENT)

    def _fill(self, found: Sequence[Mapping[Any, float]]) -> None:
        for total, node in zip(found, self.kernel.totals, strict=False):
            column = self.kernel.reduced[node]
            for row, group in enumerate(self.cohort.group_indices):
                if self._has_gradient(row):
                    key = None if node.value == "all" else group
                    self._tables["reductions"][row, column] = total[key]

    def run(self, found: Sequence[Mapping[Any, float]] = ()) -> None:
        """Update the parameters and their state."""
        sweeps = self.kernel.sweeps
        if not found:
            self._sweep(0, sweeps)
        elif sweeps == 2 and self.kernel.reduced.keys() <= set(self.kernel.totals):
            # the sweep that the totals were taken from need not be done again
            self._fill(found)
            self._sweep(1, 2)
        else:
            self._sweep_with(found, range(sweeps))
        self._finish()

    def _sweep_with(self, found: Sequence[Mapping[Any, float]], sweeps: range) -> None:
        """Sweep by sweep: each fills in what one parameter adds, where the total belongs."""
        for k in sweeps:
            self._fill(found)
            self._sweep(k, k + 1)

    def _sweep(self, first: int, last: int) -> None:
        if self._most_threads > 1 or self._threads == 0:
            threads = min(openmp.threads(), self._most_threads)
            if threads != self._threads:
                self._share_out(threads)
        self._call(self._context_address, first, last)

    def _share_out(self, threads: int) -> None:
        cuts = np.linspace(0, self._work[-1], threads + 1)
        self._bounds = np.searchsorted(self._work, cuts).astype(np.int64)
        self._bounds[-1] = len(self._work) - 1
        self._context[CONTEXT.index("bounds")] = self._bounds.ctypes.data
        self._context[CONTEXT.index("threads")] = threads
        self._threads = threads

    def _finish(self) -> None:
        params = self.cohort.params
        if self._found == tensors.PARTLY:
            params = [param for row, param in enumerate(params) if self._has_gradient(row)]
        torch.autograd.graph.increment_version(params)
        for name, values in self._fresh.items():
            self._spent = True
            for state, value in zip(self.cohort.states, values, strict=True):
                state[name] = value
        if self._grads is not None:
            if "grad" in self.cohort.program.outputs:
                for param, used in zip(self.cohort.params, self._grads, strict=True):
                    param.grad = used
            self._grads = None


def _slots_of(cohort: Cohort) -> tuple[dict[str, torch.dtype], dict[str, list[Tensor]]]:
    """The real dtype of each slot that the program has, and tensors for those without a value."""
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
    real = {name: REAL.get(dtype, dtype) for name, dtype in dtypes.items() if name in used}
    fresh = {
        name: [torch.empty_like(param).detach() for param in cohort.params]
        for name in facts.absent & used
    }
    return real, fresh


def _bring_to_layout(cohort: Cohort) -> None:
    """Give state that lies in another order of memory than its parameter the same order."""
    for param, state in zip(cohort.params, cohort.states, strict=True):
        for name in cohort.program.element_slots:
            value = state.get(name)
            if value is not None and value.stride() != param.stride():
                state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)


def _blocks(sizes: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The blocks (row, start, length) of all rows, and the first block of each row."""
    counts = -(-sizes // BLOCK)
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows = np.repeat(np.arange(len(sizes)), counts)
    starts = (np.arange(first[-1]) - first[rows]) * BLOCK
    lengths = np.minimum(BLOCK, sizes[rows] - starts)
    return np.stack([rows, starts, lengths], axis=1).astype(np.int64), first
