"""Rows: where those of sparse gradients lie in memory, looked up afresh at every step.

A row of a gradient belongs to a stretch of its parameter's memory, and of its state's. A table of
such stretches is all that compiled code needs in order to visit these and no others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cohort import PLAIN_TYPES, Cohort
from ..sparse import as_it_says, check_rows
from . import llvm, tensors
from .reading import Reading
from .schedule import Schedule

__all__ = ["RowReading"]

Table = npt.NDArray[np.int64]

EMPTY: Table = np.empty((0, 4), np.int64)


class Rows(NamedTuple):
    """A sparse gradient, its values with no row twice, and a block for each of these."""

    grad: Tensor
    values: Tensor
    blocks: Table


# Which rows are the same is found by hashing: sorting takes longer, and marking a whole table
# grows with the table. Multiplying by 2^64 / golden ratio spreads neighbours apart.
IR = """
; For each row of a gradient: [parameter, start in there, length, start in the gradient], and in
; `first` the number of the first row with its indices. Returns how many are not the first, or
; {outside}. `held` is a table of 2^(64 - shift) zeros; without it each row must come after the one
; before it, or {repeated} is returned.
define i64 @place(ptr %indices, i64 %count, i64 %dims, ptr %sizes, i64 %param, i64 %length,
                  ptr %blocks, ptr %first, ptr %held, i64 %shift) {{
entry:
  %one_by_one = icmp eq ptr %held, null
  %places = sub i64 64, %shift
  %size = shl i64 1, %places
  %mask = sub i64 %size, 1
  br label %next

next:
  %n = phi i64 [ 0, %entry ], [ %n1, %advance ]
  %repeated = phi i64 [ 0, %entry ], [ %repeated1, %advance ]
  %last = phi i64 [ -1, %entry ], [ %number, %advance ]
  %end = icmp eq i64 %n, %count
  br i1 %end, label %done, label %dim

dim:
  %d = phi i64 [ 0, %next ], [ %d1, %inside ]
  %number = phi i64 [ 0, %next ], [ %number1, %inside ]
  %whole = icmp eq i64 %d, %dims
  br i1 %whole, label %note, label %look

look:
  %before = mul i64 %d, %count
  %place = add i64 %before, %n
  %index_at = getelementptr i64, ptr %indices, i64 %place
  %extent_at = getelementptr i64, ptr %sizes, i64 %d
  %index = load i64, ptr %index_at
  %extent = load i64, ptr %extent_at
  ; unsigned: a negative one is far too large
  %fits = icmp ult i64 %index, %extent
  br i1 %fits, label %inside, label %fail

inside:
  %d1 = add i64 %d, 1
  %scaled = mul i64 %number, %extent
  %number1 = add i64 %scaled, %index
  br label %dim

note:
  %block = getelementptr [4 x i64], ptr %blocks, i64 %n
  %start_at = getelementptr i64, ptr %block, i64 1
  %length_at = getelementptr i64, ptr %block, i64 2
  %grad_start_at = getelementptr i64, ptr %block, i64 3
  %start = mul i64 %number, %length
  %grad_start = mul i64 %n, %length
  store i64 %param, ptr %block
  store i64 %start, ptr %start_at
  store i64 %length, ptr %length_at
  store i64 %grad_start, ptr %grad_start_at
  br i1 %one_by_one, label %compare_last, label %hash

compare_last:
  %rises = icmp sgt i64 %number, %last
  br i1 %rises, label %advance, label %turn

hash:
  %spread = mul i64 %number, -7046029254386353131
  %home = lshr i64 %spread, %shift
  br label %probe

probe:
  %h = phi i64 [ %home, %hash ], [ %h2, %other ]
  %held_at = getelementptr i64, ptr %held, i64 %h
  %holder = load i64, ptr %held_at
  %free = icmp eq i64 %holder, 0
  %n_1 = add i64 %n, 1
  br i1 %free, label %take, label %compare

take:
  store i64 %n_1, ptr %held_at
  br label %found

compare:
  %m = sub i64 %holder, 1
  %other_block = getelementptr [4 x i64], ptr %blocks, i64 %m
  %other_start_at = getelementptr i64, ptr %other_block, i64 1
  %other_start = load i64, ptr %other_start_at
  %same = icmp eq i64 %other_start, %start
  br i1 %same, label %again, label %other

other:
  %h1 = add i64 %h, 1
  %h2 = and i64 %h1, %mask
  br label %probe

again:
  %more = add i64 %repeated, 1
  br label %found

found:
  %owner = phi i64 [ %n, %take ], [ %m, %again ]
  %found_repeated = phi i64 [ %repeated, %take ], [ %more, %again ]
  %first_at = getelementptr i64, ptr %first, i64 %n
  store i64 %owner, ptr %first_at
  br label %advance

advance:
  %repeated1 = phi i64 [ %repeated, %compare_last ], [ %found_repeated, %found ]
  %n1 = add i64 %n, 1
  br label %next

done:
  ret i64 %repeated

turn:
  ret i64 {repeated}

fail:
  ret i64 {outside}
}}
"""

OUTSIDE = -1
"""What `place` returns if an index is out of range."""

REPEATED = -2
"""What `place` returns if rows that are said to be different and in order are not."""


@cache
def _place() -> tuple[llvm.Library, Any]:
    library = llvm.load(IR.format(outside=OUTSIDE, repeated=REPEATED))
    address, number = ctypes.c_void_p, ctypes.c_int64
    arguments = (address, *[number] * 2, address, *[number] * 2, *[address] * 3, number)
    return library, ctypes.CFUNCTYPE(number, *arguments)(library.address("place"))


class Room:
    """Where the rows of one parameter's gradients are written down: memory that is used again.

    It grows with the rows. Addresses are kept beside it, since to ask for one takes longer than a
    short step.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._sizes = np.array(shape, np.int64)
        self.sizes = self._sizes.ctypes.data
        self._make(8)

    def _make(self, count: int) -> None:
        self._count = count
        self._blocks, self._first = np.empty((count, 4), np.int64), np.empty(count, np.int64)
        self._held = np.empty(1 << (2 * count + 1).bit_length(), np.int64)
        self.blocks, self.first = self._blocks.ctypes.data, self._first.ctypes.data
        self.held = self._held.ctypes.data

    def fit(self, count: int) -> None:
        """Have room for so many rows."""
        if count > self._count:
            self._make(2 * count)

    def clear(self, count: int) -> int:
        """Make the table for these rows empty; how far to shift a number that is spread."""
        bits = (2 * count + 1).bit_length()
        self._held[: 1 << bits] = 0
        return 64 - bits

    def written(self, count: int) -> tuple[Table, Table]:
        """The blocks, and for each the number of the first with its indices."""
        return self._blocks[:count], self._first[:count]


class RowReading(Reading):
    """The addresses of a cohort whose gradients are sparse, and where their rows belong.

    Attributes:
        blocks: [parameter, start, length, start in the gradient] of each row, in real numbers
        blocks_at: the address of this table
        first: which block is the first of each parameter, and how many there are; it stays in place
        work: how many numbers there are in all rows, and 64 for each row
    """

    def __init__(self, cohort: Cohort, schedule: Schedule) -> None:
        super().__init__(cohort, schedule)
        params = cohort.params
        # what looks at dense tensors sees none among the gradients
        self._none: list[Any] = [None] * len(params)
        self._dense = tensors.Reader(
            params, self._states, self._keys, [p.detach() for p in params], self.addresses
        )
        self._factor = 2 if cohort.facts.param_dtype.is_complex else 1
        self._library, self._place = _place()
        self._rooms = [Room(param.shape) for param in params]
        self._values: list[Tensor] = []
        self.blocks: Table = np.empty((0, 4), np.int64)
        self.blocks_at = self.blocks.ctypes.data
        self.work = 0
        self.first: Table = np.zeros(len(params) + 1, np.int64)

    def load(self, _: object = None) -> bool:
        """Read all addresses and rows; False if the cohort's facts are no longer true.

        Raises:
            RuntimeError: a gradient has rows that its parameter has not
        """
        params = self.cohort.params
        self._found = self._dense.read(params, self._states, self._none)
        if self._found == tensors.DIFFERS or not self._is_apart():
            return False
        grads: list[Any] = [param.grad for param in params]
        if not all(map(self._is_as_expected, params, grads)):
            return False
        pairs = enumerate(grads)
        found = [None if grad is None else self._load_rows(row, grad) for row, grad in pairs]
        self._grads = [None if rows is None else rows.grad for rows in found]
        for row, rows in enumerate(found):
            if rows is not None:
                self.addresses[-1, row] = rows.values.data_ptr()
        present = [rows for rows in found if rows is not None]
        self._join([EMPTY if rows is None else rows.blocks for rows in found])
        numbers = self._factor * sum(rows.values.numel() for rows in present)
        self.work = numbers + 64 * len(self.blocks)
        self._values = [rows.values for rows in present]
        return True

    def _join(self, tables: Sequence[Table]) -> None:
        self.first[1:] = list(accumulate(map(len, tables)))
        if len(tables) == 1:
            self.blocks, self.blocks_at = tables[0], self._rooms[0].blocks
        else:
            self.blocks = np.concatenate(tables)
            self.blocks_at = self.blocks.ctypes.data

    def _is_as_expected(self, param: Tensor, grad: Tensor | None) -> bool:
        return grad is None or (
            type(grad) in PLAIN_TYPES
            and grad.layout is torch.sparse_coo
            and grad.dtype is self.cohort.facts.grad_dtype
            and grad.shape == param.shape
            and grad.device == param.device
        )

    def _load_rows(self, row: int, grad: Tensor) -> Rows:
        """The rows of one gradient, none of them twice."""
        if self._rewrites_grad:
            grad = as_it_says(grad).coalesce()
        indices, values = grad._indices().contiguous(), _plain(grad._values())
        length = values.shape[1:].numel() * self._factor
        count = len(values) if length else 0
        repeated = self._look_up(row, indices, count, length, is_sorted=grad.is_coalesced())
        if repeated == REPEATED:
            repeated = self._look_up(row, indices, count, length, is_sorted=False)
        if repeated == OUTSIDE:
            check_rows(grad, self.cohort.gradient_of(row))
        blocks, first = self._rooms[row].written(count)
        if repeated > 0:
            values, blocks = _summed(values, blocks, first)
        if self._rewrites_grad and values.data_ptr() != grad._values().data_ptr():
            grad = torch.sparse_coo_tensor(
                indices, values, grad.shape, is_coalesced=True, check_invariants=False
            )
        return Rows(grad, values, blocks)

    def _look_up(
        self, row: int, indices: Tensor, count: int, length: int, *, is_sorted: bool
    ) -> int:
        """Write down where the rows are, and how many of them are repetitions."""
        room = self._rooms[row]
        room.fit(count)
        found: int = self._place(
            indices.data_ptr(),
            count,
            len(indices),
            room.sizes,
            row,
            length,
            room.blocks,
            room.first,
            None if is_sorted else room.held,
            0 if is_sorted else room.clear(count),
        )
        return found

    def finish(self) -> None:
        """After the update: the tensors have changed, and gradients can be let go."""
        super().finish()
        self._values = []


def _plain(values: Tensor) -> Tensor:
    """The values without a history, as they lie in memory."""
    if values.is_conj() or values.is_neg():
        values = values.resolve_conj().resolve_neg()
    return values.detach().contiguous()


def _summed(values: Tensor, blocks: Table, first: Table) -> tuple[Tensor, Table]:
    """The values with each row's repetitions added to its first; the blocks of others go."""
    is_first = first == np.arange(len(first))
    kept, repeated = np.flatnonzero(is_first), np.flatnonzero(~is_first)
    owners = torch.from_numpy(first[repeated])
    # in place, where they are looked for
    left = blocks[: len(kept)]
    left[:] = blocks.take(kept, axis=0)
    return values.index_add(0, owners, values[torch.from_numpy(repeated)]), left
