"""Program -> Triton source: what `lowering` writes for a processor, for a device of many threads.

    rows_K      for many parameters at a time: the numbers that hold for all of their elements
    elements_K  one block of elements: what sweep K computes of it
    sweep_K     one chunk of one parameter's elements, block by block; the last sweep stores
    reduce_K    for one parameter: adds up what sweep K found in each chunk, in their order

Chunks, addresses and numbers come from tables, so that one launch covers all tensors. Where all
addresses are multiples of 16 bytes, whole blocks are moved without a mask, which compiles to
accesses of 16 bytes per thread; the rest is masked. Both do the same operations on an element, and
the compiler is not to fuse any, so that results do not depend on where a tensor lies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from ..hyperparameters import columns_of
from ..language.expr import Expr, Kind
from ..language.program import Program
from .schedule import LEAVES, Schedule
from .tensors import NO_GRADIENT

__all__ = ["CHUNK", "SUPPORTED", "Source"]

# Elements per chunk. The size is part of the result of a reduction, so it is the same everywhere.
CHUNK = 16384

# Triton expressions per operation. {0}, {1}, {2}: arguments; {t}: their type. Its plain division
# and square root are approximations in float32.
OPS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "tl.div_rn({0}, {1})",
    "neg": "{0} * -1.0",
    "abs": "tl.abs({0})",
    "sqrt": "tl.sqrt_rn({0})",
    "pow": "libdevice.pow({0}, {1})",
    "exp": "libdevice.exp({0})",
    "log": "libdevice.log({0})",
    "atan2": "libdevice.atan2({0}, {1})",
    "floor": "tl.floor({0})",
    "fma": "tl.fma({0}, {1}, {2})",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "sign": "({0} > 0).to({t}) - ({0} < 0).to({t})",
    "isfinite": 'tl.abs({0}) < float("inf")',
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "not": "{0} == 0",
    "where": "tl.where({0}, {1}, {2})",
}
# Triton has the exact ones by name for float32 only; for float64 the plain ones are exact.
IN_DOUBLE = {"div": "{0} / {1}", "sqrt": "tl.sqrt({0})"}

# How a reduction starts, how another value is taken in, and what all lanes come to.
REDUCE = {
    "sum": ("0.0", "{0} + {1}", "tl.sum({0}, axis=0)"),
    "amax": ('float("-inf")', OPS["maximum"], "largest({0})"),
}

SUPPORTED = LEAVES | OPS.keys() | REDUCE.keys() | {"lerp"}

FLOAT, DOUBLE = "tl.float32", "tl.float64"
TYPES = {
    torch.float32: FLOAT,
    torch.float64: DOUBLE,
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}

IMPORTS = "import triton\nimport triton.language as tl\n"
HELPERS = {
    "libdevice.": "from triton.language.extra import libdevice\n",
    # a function of its own, because Triton's interpreter truncates
    "to_bfloat16(": """

@triton.jit
def to_bfloat16(x):
    return x.to(tl.bfloat16)
""",
    # a maximum over lanes leaves out NaN
    "largest(": """

@triton.jit
def largest(x):
    some_nan = tl.max((x != x).to(tl.int32), axis=0) > 0
    return tl.where(some_nan, float("nan"), tl.max(tl.where(x == x, x, float("-inf")), axis=0))
""",
}


class Source(Schedule):
    """A program as Triton source.

    With `on_device`, rows_0 computes the numbers from a table of hyperparameters and the scalar
    state on the device, and nothing is changed where `found_inf` is not zero. Otherwise numbers
    come from the host, and only those that depend on a reduction are computed here.
    """

    def __init__(
        self, program: Program, dtypes: dict[str, torch.dtype], *, on_device: bool
    ) -> None:
        super().__init__(program, dtypes)
        self.on_device = on_device
        # an entry of the state may have any name
        self._names = {
            name: name if name.isidentifier() else f"slot{index}"
            for index, name in enumerate(self.slots)
        }
        self._type = DOUBLE if self.kind == "double" else FLOAT

    def text(self) -> str:
        """The source of all kernels."""
        parts = []
        for k in range(self.sweeps):
            parts += [self._rows(k)] if self.has_rows(k) else []
            parts += [self._elements(k), self._sweep(k)] if self.has_sweep(k) else []
            parts += [self._reduce(k)] if self.reductions_at(k) else []
        body = "".join(f"\n\n{part}" for part in parts)
        return IMPORTS + "".join(code for word, code in HELPERS.items() if word in body) + body

    def has_rows(self, k: int) -> bool:
        """Whether numbers have to be computed on the device before sweep k."""
        return bool(self._filled_by(k) or self._finished_by(k))

    def _filled_by(self, k: int) -> dict[Expr, int]:
        """The columns that rows_K fills."""
        if k == 0 and not self.on_device:
            return {}
        return {n: column for n, column in self.columns.items() if self.passes[n] == k}

    def _finished_by(self, k: int) -> dict[str, Expr]:
        """The scalar state that rows_K stores."""
        return self.scalar_outputs if self.on_device and k == self.sweeps - 1 else {}

    # The numbers of each parameter

    def _rows(self, k: int) -> str:
        filled, finished = self._filled_by(k), self._finished_by(k)
        body = _Body(DOUBLE)
        body.add("row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)")
        body.add("present = row < rows")
        body.add(f"present = present & ({self._entry('grad')} != {NO_GRADIENT})")
        body.add("group = tl.load(groups + row, mask=present, other=0)")
        for name in self.scalar_state:
            pointer = f"tl.pointer_type({TYPES[self.dtypes[name]]})"
            body.add(f"{self._names[name]}_ptr = {self._entry(name)}.to({pointer})")
        values = self._numbers(body, k, [*filled, *finished.values()])
        for node, column in filled.items():
            value = f"{values[node]}.to({DOUBLE})"
            body.add(f"tl.store(numbers + row * {len(self.columns)} + {column}, {value}, present)")
        if finished:
            # per lane: the interpreter cannot spread the outcome of a scalar comparison
            body.add("kept = present & (tl.load(found_inf + 0 * row) == 0)")
        for name, node in finished.items():
            value = _encoded(values[node], DOUBLE, TYPES[self.dtypes[name]])
            body.add(f"tl.store({self._names[name]}_ptr, {value}, kept)")
        tables = "addresses, groups, hyperparameters, numels, numbers, reductions, found_inf, rows"
        return body.kernel(f"rows_{k}", tables)

    def _entry(self, name: str) -> str:
        """The addresses of a slot, for a block of rows."""
        at = f"addresses + {self.slots.index(name)} * rows + row"
        return f"tl.load({at}, mask=present, other={NO_GRADIENT})"

    def _numbers(self, body: _Body, k: int, targets: Iterable[Expr]) -> dict[Expr, str]:
        """Compute these for a block of rows, from what is known before sweep k."""
        places = {}
        for node in self.program.nodes:
            if node in self.reduced:
                places[node] = f"reductions + row * {len(self.reduced)} + {self.reduced[node]}"
            elif k and node in self.columns and not self.passes[node]:
                places[node] = f"numbers + row * {len(self.columns)} + {self.columns[node]}"
            elif node.op == "group":
                names = columns_of(self.program.formula)
                column = names.index(str(node.value))
                places[node] = f"hyperparameters + group * {len(names)} + {column}"
            elif node.op == "state":
                places[node] = f"{self._names[str(node.value)]}_ptr"
            elif node.op == "numel":
                places[node] = "numels + row"
        values: dict[Expr, str] = {}
        for node in _needed(self.program.nodes, targets, places):
            if node not in places:
                values[node] = body.compute(node, values)
                continue
            load = f"tl.load({places[node]}, mask=present, other=0).to({DOUBLE})"
            values[node] = body.name(node, f"{load} != 0" if node.is_boolean else load)
        return values

    # A sweep over the elements

    def _read_by(self, k: int) -> dict[Expr, str]:
        """The numbers that sweep k reads, with their names."""
        return {n: f"n{self.columns[n]}" for n in self.wanted(k) if n in self.columns}

    def _touched_by(self, k: int) -> list[str]:
        """The slots of elements that sweep k reads or writes."""
        read = {str(n.value) for n in self.wanted(k) if n.kind is Kind.ELEMENT and not n.args}
        return [name for name in self.elements if name in read | self.stores_at(k).keys()]

    def _elements(self, k: int) -> str:
        body = _Body(self._type)
        body.add("at = start + tl.arange(0, BLOCK)")
        body.add("mask = at < count if MASKED else None")
        values = self._read_by(k)
        pointers = [f"{self._names[name]}_ptr" for name in self._touched_by(k)]
        arguments = ", ".join([*pointers, *values.values(), "start", "count"])
        for node in self.wanted(k):
            if node in values:
                continue
            if node.kind is Kind.ELEMENT and not node.args:
                name = str(node.value)
                load = f"tl.load({self._names[name]}_ptr + at, mask=mask)"
                same = TYPES[self.dtypes[name]] == self._type
                values[node] = body.name(node, load if same else f"{load}.to({self._type})")
            else:
                values[node] = body.compute(node, values)
        for name, node in self.stores_at(k).items():
            value = _encoded(values[node], self._type, TYPES[self.dtypes[name]])
            body.add(f"tl.store({self._names[name]}_ptr + at, {value}, mask=mask)")
        found = []
        for node in self.reductions_at(k):
            value = body.name(node, f"{values[node.args[0]]}.to({DOUBLE})")
            # a plain number stands for each element
            body.add(f"{value} = {value} + tl.full([BLOCK], 0.0, {DOUBLE})")
            start = REDUCE[node.op][0]
            found.append(f"tl.where(at < count, {value}, {start}) if MASKED else {value}")
        if found:
            body.add(f"return {', '.join(found)}")
        return body.function(f"elements_{k}", f"{arguments}, MASKED: tl.constexpr")

    def _sweep(self, k: int) -> str:
        touched, read, reductions = self._touched_by(k), self._read_by(k), self.reductions_at(k)
        body, names = _Body(self._type), self._names
        body.add("chunk = tl.program_id(0).to(tl.int64)")
        for j, name in enumerate(("row", "first", "count")):
            body.add(f"{name} = tl.load(chunks + 3 * chunk + {j})")
        for name in dict.fromkeys([*touched, "grad"]):
            at = f"addresses + {self.slots.index(name)} * rows + row"
            body.add(f"{self._names[name]}_address = tl.load({at})")
        # a parameter without gradient is left alone
        body.add(f"count = tl.where(grad_address == {NO_GRADIENT}, 0, count).to(tl.int32)")
        if self.on_device:
            body.add("count = tl.where(tl.load(found_inf) == 0, count, 0)")
        for name in touched:
            pointer = f"tl.pointer_type({TYPES[self.dtypes[name]]})"
            body.add(f"{names[name]}_ptr = {names[name]}_address.to({pointer}) + first")
        for node, name in read.items():
            load = f"tl.load(numbers + row * {len(self.columns)} + {self.columns[node]})"
            body.add(f"{name} = {load}" + (" != 0" if node.is_boolean else f".to({self._type})"))
        for j, node in enumerate(reductions):
            body.add(f"total{j} = tl.full([BLOCK], {REDUCE[node.op][0]}, {DOUBLE})")
        addresses = " | ".join(f"{names[name]}_address" for name in touched)
        body.add(f"is_aligned = ({addresses}) % 16 == 0")
        body.add("whole = tl.where(is_aligned, count // BLOCK * BLOCK, 0)")
        masked = [f"{names[name]}_ptr" for name in touched]
        # the second loop has this hint too, but its mask keeps it to one element per access
        aligned = [f"tl.multiple_of({pointer}, 16)" for pointer in masked]
        for bounds, pointers in (("0, whole", aligned), ("whole, count", masked)):
            is_masked = str(pointers is masked)
            arguments = ", ".join([*pointers, *read.values(), "start", "count", is_masked])
            found = ", ".join(f"found{j}" for j in range(len(reductions)))
            call = f"elements_{k}({arguments}, BLOCK)"
            body.add(f"for start in range({bounds}, BLOCK):")
            body.add(f"    {found} = {call}" if found else f"    {call}")
            for j, node in enumerate(reductions):
                body.add(f"    total{j} = " + REDUCE[node.op][1].format(f"total{j}", f"found{j}"))
        for j, node in enumerate(reductions):
            at = f"partials + chunk * {len(self.reduced)} + {self.reduced[node]}"
            body.add(f"tl.store({at}, {REDUCE[node.op][2].format(f'total{j}')})")
        return body.kernel(f"sweep_{k}", "chunks, addresses, numbers, partials, found_inf, rows")

    def _reduce(self, k: int) -> str:
        body = _Body(DOUBLE)
        body.add("row = tl.program_id(0)")
        body.add("first = tl.load(first_chunk + row)")
        body.add("last = tl.load(first_chunk + row + 1)")
        reductions = self.reductions_at(k)
        for j, node in enumerate(reductions):
            body.add(f"total{j} = tl.full([BLOCK], {REDUCE[node.op][0]}, {DOUBLE})")
        body.add("for start in range(first, last, BLOCK):")
        body.add("    at = start + tl.arange(0, BLOCK)")
        for j, node in enumerate(reductions):
            at = f"partials + at * {len(self.reduced)} + {self.reduced[node]}"
            value = f"tl.load({at}, mask=at < last, other={REDUCE[node.op][0]})"
            body.add(f"    total{j} = " + REDUCE[node.op][1].format(f"total{j}", value))
        for j, node in enumerate(reductions):
            at = f"reductions + row * {len(self.reduced)} + {self.reduced[node]}"
            body.add(f"tl.store({at}, {REDUCE[node.op][2].format(f'total{j}')})")
        return body.kernel(f"reduce_{k}", "first_chunk, partials, reductions")


def _needed(
    nodes: Iterable[Expr], targets: Iterable[Expr], known: Mapping[Expr, object]
) -> list[Expr]:
    """These and what they are computed from, back to what is known, each after its arguments."""
    ordered = list(nodes)
    wanted = {node.index for node in targets}
    for node in reversed(ordered):
        if node.index in wanted and node not in known:
            wanted.update(arg.index for arg in node.args)
    return [node for node in ordered if node.index in wanted]


def _encoded(value: str, have: str, want: str) -> str:
    """A value in the type of its slot."""
    if have == want:
        return value
    if want != "tl.bfloat16":
        return f"{value}.to({want})"
    return f"to_bfloat16({value if have == FLOAT else f'{value}.to({FLOAT})'})"


class _Body:
    """The lines of one function while they are written."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Add a line."""
        self.lines.append(f"    {line}")

    def name(self, node: Expr, value: str) -> str:
        """Add a line that gives the value of a node its name."""
        name = f"v{node.index}"
        self.add(f"{name} = {value}")
        return name

    def compute(self, node: Expr, values: Mapping[Expr, str]) -> str:
        """Add an operation of a formula, or a constant."""
        if node.op == "const":
            return self.name(node, f"tl.full((), {_literal(float(node.value or 0))}, {self.kind})")
        table = OPS | IN_DOUBLE if self.kind == DOUBLE else OPS
        return self.name(node, table[node.op].format(*(values[a] for a in node.args), t=self.kind))

    def function(self, name: str, arguments: str) -> str:
        """The function, for others to call."""
        return self._define("@triton.jit", name, arguments)

    def kernel(self, name: str, tables: str) -> str:
        """The function, to be launched; it is compiled once, whatever the tables' addresses."""
        names = ", ".join(f'"{table}"' for table in tables.split(", "))
        decorator = (
            f"@triton.jit(\n    do_not_specialize=[{names}],\n"
            f"    do_not_specialize_on_alignment=[{names}],\n)"
        )
        return self._define(decorator, name, tables)

    def _define(self, decorator: str, name: str, arguments: str) -> str:
        head = f"{decorator}\ndef {name}({arguments}, BLOCK: tl.constexpr):"
        return "\n".join([head, *self.lines, ""])


def _literal(value: float) -> str:
    return repr(value) if math.isfinite(value) else f'float("{value}")'
