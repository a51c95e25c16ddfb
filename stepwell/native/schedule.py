"""Schedule: in what order a program goes over the elements, and what each sweep needs.

A reduction is known after a sweep over all elements of its parameter, so that a program with
reductions takes several sweeps; the last one stores. What holds for all elements of a parameter
(rates, bias corrections, norms) is computed once per parameter and put into a table of numbers.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from ..language.expr import REDUCTIONS, Expr, Kind
from ..language.program import Program
from .rewrite import rewrite

__all__ = ["LEAVES", "Schedule", "blocks_of"]

LEAVES = frozenset({"param", "grad", "state", "group", "const", "numel", "epsilon"})


class Schedule:
    """A program for slots with these (real) dtypes, put into the order of native code.

    Attributes:
        kind: the type of arithmetic, "float" or "double"
        sweeps: how many times the elements are gone over
        passes: how many sweeps come before a value can be known
        reduced: the values that a reduction, or a total, fills in, each with its column
        slots: the tensors of a parameter: what is written first, the gradient last
    """

    def __init__(self, program: Program, dtypes: dict[str, torch.dtype]) -> None:
        self.kind = "double" if dtypes["param"] is torch.float64 else "float"
        self.program = program = rewrite(program, dtypes["param"])
        self.dtypes = dtypes
        self.passes = dict(zip(program.nodes, program.passes, strict=True))
        self.sweeps = 1 + max(self.passes.values(), default=0)
        known = [n for n in program.nodes if n.op in REDUCTIONS]
        known += [n for n in program.nodes if n.op == "numel" and n.value != "tensor"]
        self.reduced = {node: column for column, node in enumerate(known)}
        self.element_state = tuple(n for n in program.element_slots if n in dtypes)
        self.scalar_state = tuple(n for n in program.scalar_slots if n in dtypes)
        self.elements = ("param", *self.element_state, "grad")
        self.slots = ("param", *self.element_state, *self.scalar_state, "grad")
        self.element_outputs = {n: v for n, v in program.outputs.items() if n in self.elements}
        self.scalar_outputs = {n: v for n, v in program.outputs.items() if n in self.scalar_state}

    def reductions_at(self, k: int) -> list[Expr]:
        """The reductions that sweep k computes."""
        return [n for n in self.reduced if n.op in REDUCTIONS and self.passes[n] == k + 1]

    def stores_at(self, k: int) -> dict[str, Expr]:
        """What sweep k writes: the new values, in the last one."""
        return self.element_outputs if k == self.sweeps - 1 else {}

    def has_sweep(self, k: int) -> bool:
        """Whether the elements have to be gone over for sweep k at all."""
        return bool(self.reductions_at(k) or self.stores_at(k))

    def wanted(self, k: int) -> list[Expr]:
        """The values that sweep k needs, each after its arguments."""
        targets = [node.args[0] for node in self.reductions_at(k)]
        targets += self.stores_at(k).values()
        needed = {node.index for node in targets}
        for node in reversed(self.program.nodes):
            if node.index in needed and node.kind is Kind.ELEMENT:
                needed.update(arg.index for arg in node.args)
        return [node for node in self.program.nodes if node.index in needed]

    @cached_property
    def columns(self) -> dict[Expr, int]:
        """The column of each number that a sweep, or a number after a sweep, reads."""
        read = [node for k in range(self.sweeps) for node in self.wanted(k)]
        after = [n for n in self.program.nodes if n.kind is Kind.REDUCED]
        read += [arg for node in after for arg in node.args if arg.kind is Kind.SCALAR]
        numbers = [n for n in read if n.kind is not Kind.ELEMENT and n.op != "const"]
        return {node: column for column, node in enumerate(dict.fromkeys(numbers))}


def blocks_of(
    sizes: npt.NDArray[np.int64], size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The blocks (row, start, length) of parameters with these sizes, and the first of each."""
    counts = -(-sizes // size)
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows = np.repeat(np.arange(len(sizes)), counts)
    starts = (np.arange(first[-1]) - first[rows]) * size
    lengths = np.minimum(size, sizes[rows] - starts)
    return np.stack([rows, starts, lengths], axis=1).astype(np.int64), first
