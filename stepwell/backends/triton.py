"""Triton: one pass over memory on a GPU, one launch for all tensors of a cohort.

Where the numbers of a parameter (counts, rates) are kept on the host, they are computed there and
uploaded if they have changed; where they are kept on the device, a launch before the first sweep
computes them. Neither way does a step wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cohort import Cohort, Facts, Scaling, UnusableError
from ..language import Program
from ..native import llvm
from ..native.assembly import CONTEXT
from ..native.calls import builtin, entry
from ..native.lowering import Lowering
from ..native.reading import Reading, slots_of, unreadable
from ..native.schedule import blocks_of
from ..native.tensors import NO_GRADIENT
from ..native.triton_jit import is_interpreting, load, options, unusable
from ..native.triton_source import CHUNK, SUPPORTED, Source
from ..native.uploads import Mirror, Uploaded, current_stream, is_capturing, made_current, upload

NAME = "triton"

# Elements per block of a sweep: 16 bytes of float32 per thread and access, twice; of half
# precision once. Rows per block where the lanes are parameters, chunks where they are chunks.
BLOCK = 1024
ROWS = 128


def refuses(program: Program, facts: Facts) -> str | None:
    """Why this cohort cannot run here, or None."""
    missing = program.ops - SUPPORTED
    if missing:
        return f"no operation {', '.join(sorted(missing))}"
    if program.is_sliced:
        return "a value per row or column"
    return unusable(facts.device) or unreadable(program, facts)


Key = tuple[tuple[str, torch.dtype], ...]


@cache
def _source(program: Program, dtypes: Key, on_device: bool) -> tuple[Source, Any]:
    source = Source(program, dict(dtypes), on_device=on_device)
    return source, load(source.text(), program.name)


@cache
def _host_rows(program: Program, dtypes: Key) -> Callable[..., int]:
    """rows_0 for the host, which leaves the numbers in float64."""
    call = entry("rows_0", ["address"], result=False, unlocked=True)
    return builtin(llvm.load(Lowering(program, dict(dtypes)).rows_module() + call), "rows_0")


class Stage(NamedTuple):
    """One launch of a kernel."""

    name: str
    programs: int
    block: int
    tables: tuple[Any, ...]


class Launch:
    """The tables of a cohort on host and device, and the kernels that work through them."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self._has_numbers = cohort.facts.on_device
        # whether state that has no value yet gets one must be known on the host
        self.stays_on_device = self._has_numbers and not cohort.facts.absent
        self._device = cohort.facts.device
        self._options = options("hip" if torch.version.hip else self._device.type)
        dtypes = tuple(slots_of(cohort).items())
        self._source, functions = _source(cohort.program, dtypes, self._has_numbers)
        self._reading = Reading(cohort, self._source)
        self._rows = len(cohort.params)
        self._scaling = Scaling()
        self._uploaded: Uploaded | None = None
        self._done = 0
        self._filled = 0
        with made_current(self._device):
            self._make_tables()
            copy = self._mirror.copy
            self._usual = [self._stages(k, copy) for k in range(self._source.sweeps)]
            self._kernels = self._compile(functions)
        if not self._has_numbers:
            self._host_rows = _host_rows(cohort.program, dtypes)
            self._make_host_context()

    def _make_tables(self) -> None:
        cohort, source, sizes = self.cohort, self._source, self._reading.sizes
        chunks, first = blocks_of(sizes, CHUNK)
        columns, width = max(len(source.columns), 1), max(len(source.reduced), 1)
        hyperparameters = cohort.hyperparameters.table
        floats = hyperparameters.size if self._has_numbers else self._rows * columns
        self._mirror = Mirror(self._reading.addresses.size, floats, self._device)
        self._groups = self._up(np.array(cohort.group_indices, np.int64))
        self._chunks, self._chunk_count = self._up(chunks), len(chunks)
        self._first_chunk = self._up(first)
        self._numels = self._up(sizes.astype(np.float64))
        self._numbers = self._scratch(self._rows, columns)
        self._partials = self._scratch(len(chunks), width)
        self._reductions = self._scratch(self._rows, width)
        self._never = self._found_inf = torch.zeros((), device=self._device, dtype=torch.float32)
        self._stream = current_stream(self._device)

    def _scratch(self, rows: int, columns: int) -> Tensor:
        return torch.empty((rows, columns), dtype=torch.float64, device=self._device)

    def _up(self, array: Any) -> Tensor:
        return upload(array, self._device, self.cohort.kept)

    def _make_host_context(self) -> None:
        """The tables of the host's rows_0."""
        width = max(len(self._source.reduced), 1)
        self._host_tables: dict[str, Any] = {
            "addresses": self._reading.addresses,
            "hyperparameters": self.cohort.hyperparameters.table,
            "groups": np.array(self.cohort.group_indices, np.int64),
            "numbers": self._mirror.floats,
            "reductions": np.zeros((self._rows, width)),
            "numels": self._reading.sizes.astype(np.float64),
        }
        self._context = np.zeros(len(CONTEXT), np.int64)
        self._context[CONTEXT.index("rows")] = self._rows
        for name, table in self._host_tables.items():
            self._context[CONTEXT.index(name)] = table.ctypes.data

    # One step

    def load(self, scaling: Scaling) -> bool:
        """Read all addresses; False if the cohort's facts are no longer true."""
        self._scaling = scaling
        self._uploaded = None
        self._done = self._filled = 0
        return self._reading.load()

    def shares(self, found: Sequence[Any]) -> Any:
        """What each parameter adds to the next total of the program: a number per row."""
        totals = self._source.program.totals
        if len(found) >= len(totals):
            return []
        node = totals[len(found)]
        with made_current(self._device):
            self._fill(found)
            uploaded = self._sweep_up_to(self._source.passes[node])
            if node.op == "numel":
                has_gradient = uploaded.integers[-self._rows :] != NO_GRADIENT
                return torch.where(has_gradient, self._numels, 0.0)
            return self._reductions[:, self._source.reduced[node]].clone()

    def run(self, found: Sequence[Any] = ()) -> None:
        """Update the parameters and their state, given all totals of the program."""
        with made_current(self._device):
            self._fill(found)
            self._sweep_up_to(self._source.sweeps)
        self._reading.finish()

    def _fill(self, found: Sequence[Any]) -> None:
        """Put totals where a parameter's own share of them was."""
        totals = self._source.program.totals[: len(found)]
        for node, total in list(zip(totals, found, strict=False))[self._filled :]:
            values = self._of_each_row(total, node.value == "all")
            self._reductions[:, self._source.reduced[node]].copy_(values, non_blocking=True)
            self._filled += 1

    def _of_each_row(self, total: Any, is_of_all: bool) -> Tensor:
        if isinstance(total, Tensor):
            # by group, the last one for all parameters
            here: Tensor = total.to(self._device, non_blocking=True)
            if is_of_all:
                return here[-1].expand(self._rows)
            return here.index_select(0, self._groups)
        groups = self.cohort.group_indices
        keys = [None] * self._rows if is_of_all else groups
        # a group without gradients adds nothing, and asks for nothing
        return self._up(np.array([total.get(key, 0.0) for key in keys], np.float64))

    def _sweep_up_to(self, count: int) -> Uploaded:
        if self._uploaded is None:
            self._uploaded = self._upload()
        while self._done < count:
            self._sweep(self._done, self._uploaded)
            self._done += 1
        return self._uploaded

    def _upload(self) -> Uploaded:
        """Bring the device's tables up to date."""
        self._follow_stream()
        self._mirror.integers[:] = self._reading.addresses.ravel()
        if self._has_numbers:
            self._mirror.floats[:] = self.cohort.hyperparameters.table.ravel()
        else:
            self._host_rows(self._context.ctypes.data)
        if is_capturing(self._device):
            kept = self.cohort.kept
            uploaded = self._mirror.send_captured(kept)
            kept += [self.cohort, *self._tables()]
        else:
            uploaded = self._mirror.send()
        if self._has_numbers:
            self._copy_hyperparameters(uploaded.floats)
            found_inf = self._scaling.found_inf
            self._found_inf = self._never
            # a scaler that has seen no gradient says 0
            if isinstance(found_inf, Tensor):
                self._found_inf = found_inf.to(self._device, torch.float32, non_blocking=True)
        return uploaded

    def _copy_hyperparameters(self, table: Tensor) -> None:
        """Numbers that are tensors on a device go into the table there."""
        known = self.cohort.hyperparameters
        rates = table.view(known.table.shape)
        if known.on_device:
            places = [rates[cell] for cell in known.on_device]
            values = [value.detach().reshape(()) for value in known.on_device.values()]
            torch._foreach_copy_(places, values)
        scale = self._scaling.grad_scale
        if isinstance(scale, Tensor):
            column = rates[:, known.columns.index("grad_scale")]
            column.copy_(scale.reshape(()).expand_as(column), non_blocking=True)

    def _stages(self, k: int, uploaded: Uploaded) -> list[Stage]:
        """The launches of sweep k."""
        source, addresses = self._source, uploaded.integers
        numbers = self._numbers if self._has_numbers else uploaded.floats
        rows = (
            *(addresses, self._groups, uploaded.floats, self._numels, numbers, self._reductions),
            *(self._found_inf, self._rows),
        )
        sweep = self._chunks, addresses, numbers, self._partials, self._found_inf, self._rows
        reduce = self._first_chunk, self._partials, self._reductions
        stages = []
        if source.has_rows(k):
            stages.append(Stage(f"rows_{k}", -(-self._rows // ROWS), ROWS, rows))
        if source.has_sweep(k):
            stages.append(Stage(f"sweep_{k}", self._chunk_count, BLOCK, sweep))
        if source.reductions_at(k):
            stages.append(Stage(f"reduce_{k}", self._rows, ROWS, reduce))
        return stages

    def _sweep(self, k: int, uploaded: Uploaded) -> None:
        if uploaded is self._mirror.copy and self._found_inf is self._never:
            stages = self._usual[k]
        else:
            stages = self._stages(k, uploaded)
        for name, programs, block, tables in stages:
            if not programs:
                continue
            kernel = self._kernels[name][(programs, 1, 1)]
            if is_interpreting():
                # NumPy warns of what a GPU does in silence
                with np.errstate(all="ignore"):
                    kernel(*tables, block)
            else:
                kernel(*tables, block)

    def _compile(self, functions: Mapping[str, Any]) -> Mapping[str, Any]:
        """Compile and load all kernels, so that nothing can fail in the middle of a step.

        What Triton returns is launched as it is: it need not look at the arguments' types again.

        Raises:
            UnusableError: Triton is there, but cannot compile or load
        """
        if is_interpreting():
            return functions
        kernels = {}
        try:
            for name, _, block, tables in chain.from_iterable(self._usual):
                kernel = functions[name].warmup(*tables, block, grid=(1,), **self._options)
                kernel._init_handles()
                kernels[name] = kernel
        except Exception as error:
            raise UnusableError(f"Triton cannot compile for {self._device}: {error}") from error
        return kernels

    def _tables(self) -> list[Tensor]:
        return [
            self._groups,
            self._chunks,
            self._first_chunk,
            self._numels,
            self._numbers,
            self._partials,
            self._reductions,
            self._never,
            *self._mirror.tensors(),
        ]

    def _follow_stream(self) -> None:
        """Tell torch's allocator if the tables are now used on another stream than before."""
        stream = current_stream(self._device)
        if stream != self._stream:
            self._stream = stream
            for table in self._tables():
                table.record_stream(stream)
