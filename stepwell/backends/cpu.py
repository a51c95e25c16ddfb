"""Native code for the processor: one pass over memory, one call for all tensors of a cohort."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..cohort import Cohort, Facts, Scaling
from ..language import Program
from ..language.program import WHOLE
from ..native import llvm, openmp
from ..native.assembly import CONTEXT
from ..native.calls import builtin, entry
from ..native.lowering import SUPPORTED, Lowering
from ..native.nests import SlicedLowering
from ..native.reading import Reading, dtypes_of, slots_of, unreadable
from ..native.rows import RowReading
from ..native.slices import unsliceable

NAME = "cpu"

# Elements per block. A block of every slot of AdamW in float32 fits into an L2 cache; the size is
# part of the result of a reduction, so it is the same everywhere.
BLOCK = 16384
# Waking a thread costs about as much as this many elements.
GRAIN = 16384


def refuses(program: Program, facts: Facts) -> str | None:
    """Why this cohort cannot run here, or None."""
    missing = program.ops - SUPPORTED
    if missing:
        return f"no operation {', '.join(sorted(missing))}"
    if reason := unsliceable(program):
        return reason
    if facts.device.type != "cpu":
        return f"memory on {facts.device}"
    if facts.layout == "rows" and not program.ops.isdisjoint(WHOLE):
        return "a reduction over rows that are not there"
    if reason := unreadable(program, facts, ("dense", "sharded", "rows")):
        return reason
    if torch.float16 in dtypes_of(facts) and llvm.features().isdisjoint({"f16c", "neon"}):
        return "no conversion of float16 in this processor"
    return None


@cache
def _compiled(
    program: Program, dtypes: tuple[tuple[str, torch.dtype], ...]
) -> tuple[Lowering, Callable[..., int]]:
    schedule = (SlicedLowering if program.is_sliced else Lowering)(program, dict(dtypes))
    call = entry("run", ["address", "number", "number"], result=False, unlocked=True)
    library = llvm.load(schedule.module(openmp.runtime()) + call)
    return schedule, builtin(library, "run")


def _shares(work: npt.NDArray[np.int64], threads: int) -> npt.NDArray[np.int64]:
    """The first block of each thread, so that all have about the same to do, and the end."""
    # to go to a block takes some time too
    ends = np.concatenate([[0], np.cumsum(work + 64)])
    bounds = np.searchsorted(ends, np.linspace(0, ends[-1], threads + 1)).astype(np.int64)
    bounds[-1] = len(work)
    return bounds


class Launch:
    """The tables of a cohort, and the compiled program that works through them."""

    stays_on_device = False
    _context: npt.NDArray[np.int64]

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        dtypes = tuple(slots_of(cohort).items())
        self._schedule, self._call = _compiled(cohort.program, dtypes)
        has_rows = cohort.facts.layout == "rows"
        self._reading = (RowReading if has_rows else Reading)(cohort, self._schedule)
        self._make_tables()
        if not has_rows:
            # nothing else changes from step to step
            self.load = self._reading.load  # type: ignore[method-assign]

    def load(self, _: Scaling) -> bool:
        """Read this step's gradients, whose rows are its blocks; False if facts have changed."""
        rows = self._reading
        assert isinstance(rows, RowReading)
        if not rows.load():
            return False
        # kept, for what is written down is an address
        self._tables["blocks"] = rows.blocks
        self._context[CONTEXT.index("blocks")] = rows.blocks_at
        self._most_threads = max(1, rows.work // GRAIN)
        self._threads = 0
        return True

    def _make_tables(self) -> None:
        cohort, schedule, sizes = self.cohort, self._schedule, self._reading.sizes
        self._layout = layout = schedule.layout(cohort.params, sizes, BLOCK)
        width, columns = max(len(schedule.reduced), 1), max(len(schedule.columns), 1)
        number = np.float64 if schedule.kind == "double" else np.float32
        self._alone = np.zeros(2, np.int64)
        self._alone_at = self._alone.ctypes.data
        self._tables: dict[str, npt.NDArray[Any]] = {
            "addresses": self._reading.addresses,
            "hyperparameters": cohort.hyperparameters.table,
            "groups": np.array(cohort.group_indices, np.int64),
            "numbers": np.zeros((len(sizes), columns), number),
            "partials": np.zeros((len(layout.work), width)),
            "reductions": np.zeros((len(sizes), width)),
            "numels": sizes.astype(np.float64),
            **layout.tables,
        }
        if isinstance(self._reading, RowReading):
            self._tables["first_block"] = self._reading.first
        self._most_threads = max(1, int(sizes.sum()) // GRAIN)
        self._context = np.zeros(len(CONTEXT), np.int64)
        self._context[CONTEXT.index("rows")] = len(sizes)
        for name, table in self._tables.items():
            self._context[CONTEXT.index(name)] = table.ctypes.data
        self._context_address = self._context.ctypes.data
        self._threads = 0

    def shares(self, found: Sequence[Mapping[Any, float]]) -> list[tuple[int | None, float]]:
        """Run the sweeps that the next total needs; what each parameter adds to it."""
        if len(found) >= len(self._schedule.program.totals):
            return []
        node = self._schedule.program.totals[len(found)]
        if node.op == "numel":
            values = self._tables["numels"].tolist()
        else:
            self._sweep_with(found, range(self._schedule.passes[node]))
            values = self._tables["reductions"][:, self._schedule.reduced[node]].tolist()
        groups = self.cohort.group_indices
        keys = [None if node.value == "all" else group for group in groups]
        pairs = enumerate(zip(keys, values, strict=True))
        return [pair for row, pair in pairs if self._reading.has_gradient(row)]

    def _fill(self, found: Sequence[Mapping[Any, float]]) -> None:
        for total, node in zip(found, self._schedule.program.totals, strict=False):
            column = self._schedule.reduced[node]
            for row, group in enumerate(self.cohort.group_indices):
                if self._reading.has_gradient(row):
                    key = None if node.value == "all" else group
                    self._tables["reductions"][row, column] = total[key]

    def run(self, found: Sequence[Mapping[Any, float]] = ()) -> None:
        """Update the parameters and their state."""
        sweeps = self._schedule.sweeps
        if not found:
            self._sweep(0, sweeps)
        elif sweeps == 2 and self._schedule.reduced.keys() <= set(self._schedule.program.totals):
            # the sweep that the totals were taken from need not be done again
            self._fill(found)
            self._sweep(1, 2)
        else:
            self._sweep_with(found, range(sweeps))
        self._reading.finish()

    def _sweep_with(self, found: Sequence[Mapping[Any, float]], sweeps: range) -> None:
        """Sweep by sweep: each fills in what one parameter adds, where the total belongs."""
        for k in sweeps:
            self._fill(found)
            self._sweep(k, k + 1)

    def _sweep(self, first: int, last: int) -> None:
        most = self._most_threads
        if most > 1 or self._threads == 0:
            threads = min(openmp.threads(), most) if most > 1 else 1
            if threads != self._threads:
                self._share_out(threads)
        self._call(self._context_address, first, last)

    def _work(self) -> npt.NDArray[np.int64]:
        """How much there is to do in each block."""
        reading = self._reading
        return reading.blocks[:, 2] if isinstance(reading, RowReading) else self._layout.work

    def _share_out(self, threads: int) -> None:
        work = self._work()
        if threads == 1:
            self._alone[1], bounds_at = len(work), self._alone_at
        else:
            self._bounds = _shares(work, threads)
            bounds_at = self._bounds.ctypes.data
        self._context[CONTEXT.index("bounds")] = bounds_at
        self._context[CONTEXT.index("threads")] = threads
        self._threads = threads
