"""Slices: programs with values per row, column or matrix, put into the order of native code.

A value that has size 1 in some dimension is computed once per slice, in loops over the slices
alone, and written down in a scratch memory for the loops that read it. What is summed over rows is
added up within parts of a matrix first, then part by part, so that results do not depend on the
number of threads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..language.expr import ALONG, REDUCTIONS, Expr, Kind
from ..language.program import Program
from .assembly import EXTENTS, SHAPE
from .lowering import Layout, Lowering

__all__ = [
    "COLUMNS",
    "ELEMENTS",
    "MATRICES",
    "NAMES",
    "ROWS",
    "SLICES",
    "Over",
    "Slices",
    "unsliceable",
]

Over = tuple[int, ...]

ELEMENTS, ROWS, COLUMNS, MATRICES = (), (-1,), (-2,), (-2, -1)
NAMES: dict[Over, str] = {
    ELEMENTS: "elements",
    ROWS: "rows",
    COLUMNS: "columns",
    MATRICES: "matrices",
}
SLICES = (MATRICES, ROWS, COLUMNS)
"""In an order in which each reads only what comes before, but for reductions."""

PART, MOST_PARTS = 2**17, 32
"""The least elements of a part of a matrix, and the most parts that a matrix has."""


def unsliceable(program: Program) -> str | None:
    """Why there is no such code for a program, or None."""
    dims = {int(n.value or 0) for n in program.nodes if n.op in ALONG or n.op == "extent"}
    dims |= {dim for node in program.nodes for dim in node.over}
    if strange := dims - EXTENTS.keys():
        return f"reductions along dimension {', '.join(map(str, sorted(strange)))}"
    moved = [name for name, n in program.outputs.items() if n.over and n.op == "state"]
    return f"another entry of the state becomes {moved[0]}" if moved else None


def _shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A row of the table of shapes."""
    n, m = (1, 1, *shape)[-2:]
    matrices = int(np.prod(shape[:-2], dtype=np.int64))
    if not n * m * matrices:
        # no loop is entered
        return 0, 1, 0, 0, 0, 1, 1
    parts = max(1, min(MOST_PARTS, n, n * m // PART))
    part = -(-n // parts)
    return m, n, n * matrices, m * matrices, matrices, part, -(-n // part)


def _tiles(
    shapes: npt.NDArray[np.int64], size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The blocks (parameter, first row, rows) of parameters, and the first block of each.

    A block is a part of a matrix, or as many whole matrices as have about `size` elements.
    """
    tiles: list[tuple[int, int, int]] = []
    first = [0]
    for index, (m, n, rows, _, _, part, parts) in enumerate(shapes.tolist()):
        height = part if parts > 1 else n * max(1, size // max(n * m, 1))
        for start in range(0, rows, n if parts > 1 else height):
            stop = min(start + (n if parts > 1 else height), rows)
            tiles += [(index, at, min(height, stop - at)) for at in range(start, stop, height)]
        first.append(len(tiles))
    return np.array(tiles, np.int64).reshape(-1, 3), np.array(first, np.int64)


class Slices(Lowering):
    """A program with values per row, column or matrix.

    Attributes:
        kept: the values that are written down, each with its number
        stacks: the reductions over rows, each with its number
    """

    def __init__(self, program: Program, dtypes: dict[str, torch.dtype]) -> None:
        super().__init__(program, dtypes)
        nodes = self.program.nodes
        users: defaultdict[Expr, set[tuple[Over, int]]] = defaultdict(set)
        for node in nodes:
            for arg in node.args:
                users[arg].add(self._home(node))
        ends = set(self.program.outputs.values())
        written = [
            node
            for node in nodes
            if node.over
            and node.args
            and (node.op in ALONG or node in ends or users[node] - {self._home(node)})
        ]
        self.kept = {node: number for number, node in enumerate(written)}
        stacked = [n for n in nodes if n.op in ALONG and _is_stacked(n)]
        self.stacks = {node: number for number, node in enumerate(stacked)}
        self._overs = {name: self._over(name) for name in self.elements}

    def _home(self, node: Expr) -> tuple[Over, int]:
        """The loops in which a value is computed: over what, and before or in which sweep."""
        if node.op in ALONG | REDUCTIONS:
            return node.args[0].over, self.passes[node] - 1
        return node.over, self.passes[node]

    def _over(self, name: str) -> Over:
        slot = self.program.slots.get(name)
        if slot is None or slot.over is None:
            return ELEMENTS
        ndim = max(self.program.ndim or 0, 1)
        return (slot.over - ndim if slot.over >= 0 else slot.over,)

    # What each nest of loops does

    def reductions(self, over: Over, k: int) -> list[Expr]:
        """The reductions of values that are one per slice, in the loops before sweep k."""
        found = [node for node in self.program.nodes if node.op in ALONG | REDUCTIONS]
        return [node for node in found if self._home(node) == (over, k)]

    def reductions_at(self, k: int) -> list[Expr]:
        """The numbers per parameter that sweep k computes."""
        return [node for node in self.reductions(ELEMENTS, k) if node.op in REDUCTIONS]

    def has_sweep(self, k: int) -> bool:
        """Whether the elements have to be gone over for sweep k at all."""
        return self.has_nest(ELEMENTS, k)

    def has_nest(self, over: Over, k: int) -> bool:
        return bool(self.reductions(over, k) or self.stores(over, k))

    def stores(self, over: Over, k: int) -> dict[str, Expr]:
        """What the loops write, by the name of the array."""
        last = self.sweeps - 1 if over == ELEMENTS else self.sweeps
        if k == last:
            outputs = self.element_outputs.items()
            return {name: node for name, node in outputs if self._overs[name] == over}
        mine = [n for n in self.kept if n.op not in ALONG and self._home(n) == (over, k)]
        return {f"kept{self.kept[node]}": node for node in mine}

    def stores_at(self, k: int) -> dict[str, Expr]:
        """What sweep k writes, of values per element."""
        return self.stores(ELEMENTS, k)

    def wanted(self, k: int) -> list[Expr]:
        """The values that sweep k needs, each after its arguments."""
        return self.wanted_by(ELEMENTS, k)

    def wanted_by(self, over: Over, k: int) -> list[Expr]:
        targets = [node.args[0] for node in self.reductions(over, k)]
        needed = {node.index for node in [*targets, *self.stores(over, k).values()]}
        for node in reversed(self.program.nodes):
            if node.index in needed and self.is_computed(node, over, k):
                needed.update(arg.index for arg in node.args)
        return [node for node in self.program.nodes if node.index in needed]

    def is_computed(self, node: Expr, over: Over, k: int) -> bool:
        """Whether these loops compute a value, instead of reading it."""
        if node.kind is not Kind.ELEMENT or not node.args or node.over != over:
            return False
        # values per element are computed anew in every sweep
        return over == ELEMENTS or (node.op not in ALONG and self.passes[node] == k)

    @cached_property
    def columns(self) -> dict[Expr, int]:
        """The column of each number that loops, or a number after a sweep, read."""
        levels = range(self.sweeps + 1)
        read = [n for over in NAMES for k in levels for n in self.wanted_by(over, k)]
        after = [n for n in self.program.nodes if n.kind is Kind.REDUCED]
        read += [arg for node in after for arg in node.args if arg.kind is Kind.SCALAR]
        numbers = [n for n in read if n.kind is not Kind.ELEMENT and n.op != "const"]
        return {node: column for column, node in enumerate(dict.fromkeys(numbers))}

    def has_slices(self, k: int) -> bool:
        gathers = any(self.passes[node] == k for node in self.stacks)
        return gathers or any(self.has_nest(over, k) for over in SLICES)

    def array(self, name: str) -> tuple[Over, torch.dtype | None]:
        """What an array has one value per, and their dtype: None for that of arithmetic."""
        if name in self.elements:
            return self._overs[name], self.dtypes[name]
        return list(self.kept)[int(name.removeprefix("kept"))].over, None

    def name_of(self, node: Expr) -> str:
        """The array in which a value is found."""
        return f"kept{self.kept[node]}" if node in self.kept else str(node.value)

    def arrays(self, over: Over, k: int) -> list[str]:
        """The arrays that a nest reads or writes, but for stacks."""
        wanted = [n for n in self.wanted_by(over, k) if n.kind is Kind.ELEMENT]
        read = [self.name_of(n) for n in wanted if not self.is_computed(n, over, k)]
        found = [n for n in self.reductions(over, k) if n in self.kept and n not in self.stacks]
        return list(dict.fromkeys([*read, *self.stores(over, k), *map(self.name_of, found)]))

    def layout(
        self, params: Sequence[torch.Tensor], sizes: npt.NDArray[np.int64], block: int
    ) -> Layout:
        """The blocks of these parameters, whole rows each, and memory for slices."""
        shapes = np.array([_shape(tuple(param.shape)) for param in params], np.int64)
        size = dict(zip(SHAPE, shapes.T, strict=True))
        tiles, first = _tiles(shapes, block)
        counts = [(over, sum(node.over == over for node in self.kept)) for over in SLICES]
        kept = np.stack([size[NAMES[over]] * count for over, count in counts]).sum(axis=0)
        stacked = size["columns"] * size["parts"] * len(self.stacks)
        number = np.float64 if self.kind == "double" else np.float32
        scratch, scratch_starts = _memory(kept, number)
        stacks, stack_starts = _memory(stacked, np.float64)
        tables = {
            "blocks": np.column_stack([tiles, tiles[:, 1]]),
            "first_block": first,
            "shapes": shapes,
            "scratch": scratch_starts,
            "stacks": stack_starts,
        }
        return Layout(tables, tiles[:, 2] * size["m"][tiles[:, 0]], (scratch, stacks))


def _memory(
    sizes: npt.NDArray[np.int64], number: type[np.floating[Any]]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Memory for so many numbers of each parameter, and where each one's begins."""
    # a cache line apart, which threads share only to their cost
    ends = np.cumsum(-(-sizes // 16) * 16)
    memory = np.empty(int(ends[-1]) if len(ends) else 0, number)
    starts = memory.ctypes.data + memory.itemsize * np.concatenate([[0], ends[:-1]])
    return memory, starts.astype(np.int64)


def _is_stacked(node: Expr) -> bool:
    """Whether a reduction adds up what its inner loop goes along."""
    return node.args[0].over == ELEMENTS and node.value == -2
