"""Program -> LLVM IR: the numbers of each parameter, the sweeps over its elements, the order.

    rows_K    for each parameter, the numbers that hold for all of its elements: in float64, from
              the hyperparameters, the scalar state and, for K > 0, the reductions so far
    sweep_K   over one block of one parameter's elements; the last sweep stores
    share_K   the blocks of sweep K, shared out to OpenMP's threads
    reduce_K  adds up what sweep K found in each block, in the order of the blocks
    run       all of these in turn, for sweeps from one number up to another

Blocks do not depend on the number of threads, and each element is computed by the same
operations wherever it lies, so results are the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..hyperparameters import columns_of
from ..language.expr import ALONG, Expr, Kind
from . import llvm
from .assembly import CONTEXT, EXTENTS, MEMORY, OPS, Body, declarations
from .openmp import Runtime
from .schedule import LEAVES, Schedule, blocks_of
from .tensors import NO_GRADIENT

__all__ = ["SUPPORTED", "Layout", "Lowering"]

# How a reduction starts, and how two parts are joined. A sum may be taken in any order within a
# block, so that it is taken several elements at once: the same order on the same processor.
REDUCE = {
    "sum": ("0.0", "fadd reassoc double {0}, {1}"),
    "amax": ("0xFFF0000000000000", "call double @llvm.maximum.f64(double {0}, double {1})"),
}

SUPPORTED = LEAVES | OPS.keys() | REDUCE.keys() | ALONG | {"extent", "lerp"}


class Layout(NamedTuple):
    """How the work on some parameters is cut up.

    `tables` are words of the context; `work` is how many elements each block has; `memory` is what
    some of the tables point at.
    """

    tables: dict[str, npt.NDArray[Any]]
    work: npt.NDArray[np.int64]
    memory: tuple[Any, ...] = ()


class Lowering(Schedule):
    """A program as LLVM IR."""

    def module(self, runtime: Runtime | None) -> str:
        """All functions, up to `run`."""
        parts = [declarations()]
        for k in range(self.sweeps):
            parts.append(self.rows(k, self.kind, finish=k == self.sweeps - 1))
            if self.has_sweep(k):
                parts += [self.sweep(k), self.block(k), _share(k, runtime)]
            parts += [self.reduce(k)] if self.reductions_at(k) else []
        return "\n".join([*parts, self.run()])

    def calls(self, k: int) -> list[str]:
        """The functions of sweep k, in their order."""
        calls = [f"rows_{k}", *([f"share_{k}"] if self.has_sweep(k) else [])]
        return [*calls, *([f"reduce_{k}"] if self.reductions_at(k) else [])]

    def rows_module(self) -> str:
        """rows_0 alone, with a table of float64, for sweeps that are done elsewhere."""
        return "\n".join([declarations(), self.rows(0, "double", finish=True, linkage="")])

    def layout(self, params: Sequence[Tensor], sizes: npt.NDArray[np.int64], block: int) -> Layout:
        """The blocks of these parameters, of up to `block` elements each."""
        blocks, first = blocks_of(sizes, block)
        # a dense gradient's block starts where its parameter's does
        tables = {"blocks": np.column_stack([blocks, blocks[:, 1]]), "first_block": first}
        return Layout(tables, blocks[:, 2])

    @cached_property
    def tames(self) -> bool:
        """Whether loops have no NaN with lower bits, so that each bfloat16 is rounded in less."""
        rounded = sum(self.dtypes[name] is torch.bfloat16 for name in self.element_outputs)
        wider = sum(self.dtypes[name] is not torch.bfloat16 for name in self.elements)
        return self.kind == "float" and rounded > wider

    # The numbers of each parameter

    def rows(self, k: int, kind: str, *, finish: bool, linkage: str = "internal") -> str:
        """rows_K: fill the columns that are known before sweep K; `finish` stores scalar state.

        `kind` is the type of the table's entries.
        """
        body = Body()
        rows = body.word("rows")
        tables = {name: body.pointer(name) for name in CONTEXT[1:10]}
        remembered = (
            "row",
            "group",
            *self.scalar_state,
            *(f"new {n}" for n in self.scalar_outputs),
        )
        memory = {name: body.emit("alloca i64") for name in remembered}
        body.do(f"store i64 -1, ptr {memory['group']}", "br label %next", "next:")
        body.do("%row = phi i64 [ 0, %0 ], [ %row1, %advance ]")
        body.do(f"%over = icmp eq i64 %row, {rows}", "br i1 %over, label %end, label %present")
        body.do("present:")
        absent = self._is_absent(body, tables["addresses"], rows, "%row")
        body.do(f"br i1 {absent}, label %advance, label %work", "work:")
        group = body.item("i64", tables["groups"], "%row")
        places = {n: self._place(body, tables["addresses"], rows, n) for n in self.scalar_state}
        old = {name: body.load(self.dtypes[name], at) for name, at in places.items()}
        self._branch_if_same(body, memory, group, old)
        self._copy_row(body, kind, tables["numbers"], memory["row"])
        body.do("compute:")
        values = self._numbers(body, k, tables, group, old)
        self._fill(body, kind, tables["numbers"], values)
        self._remember(body, memory, {"group": group, **old}, values if finish else {})
        body.do("br label %finish", "finish:")
        if finish:
            for name in self.scalar_outputs:
                value = body.emit(f"load double, ptr {memory['new ' + name]}")
                body.store(self.dtypes[name], value, places[name])
        body.do("br label %advance", "advance:")
        body.do("%row1 = add i64 %row, 1", "br label %next", "end:", "ret void")
        return body.function(f"void @rows_{k}(ptr %context)", linkage)

    def _is_absent(self, body: Body, addresses: str, rows: str, row: str) -> str:
        """Whether a parameter has no gradient in this step, and is to be left alone."""
        before = body.emit(f"mul i64 {rows}, {self.slots.index('grad')}")
        address = body.item("i64", addresses, body.emit(f"add i64 {before}, {row}"))
        return body.emit(f"icmp eq i64 {address}, {NO_GRADIENT}")

    def _place(self, body: Body, addresses: str, rows: str, name: str) -> str:
        start = body.emit(f"mul i64 {rows}, {self.slots.index(name)}")
        return body.item("ptr", addresses, body.emit(f"add i64 {start}, %row"))

    def _branch_if_same(
        self, body: Body, memory: dict[str, str], group: str, old: dict[str, str]
    ) -> None:
        """Parameters of one group that were stepped equally often have the same numbers."""
        if self.sweeps > 1 or any(n.op in ("numel", "extent") for n in self.program.nodes):
            body.do("br label %compute")
            body.do("copy:")
            return
        last = body.emit(f"load i64, ptr {memory['group']}")
        same = body.emit(f"icmp eq i64 {group}, {last}")
        for name, value in old.items():
            last = body.emit(f"load double, ptr {memory[name]}")
            equal = body.emit(f"fcmp oeq double {value}, {last}")
            same = body.emit(f"and i1 {same}, {equal}")
        body.do(f"br i1 {same}, label %copy, label %compute", "copy:")

    def _copy_row(self, body: Body, kind: str, numbers: str, last_computed: str) -> None:
        before = body.emit(f"load i64, ptr {last_computed}")
        width = len(self.columns)
        start, to = (body.cell(kind, numbers, width, row, 0) for row in (before, "%row"))
        size = width * (8 if kind == "double" else 4)
        body.do(f"call void @llvm.memcpy.p0.p0.i64(ptr {to}, ptr {start}, i64 {size}, i1 false)")
        body.do("br label %finish")

    def _numbers(
        self, body: Body, k: int, tables: dict[str, str], group: str, old: dict[str, str]
    ) -> dict[Expr, str]:
        names = columns_of(self.program.formula)
        values: dict[Expr, str] = {}
        for node in self.program.nodes:
            if node.kind is Kind.ELEMENT or self.passes[node] > k:
                continue
            if node in self.reduced:
                width, column = len(self.reduced), self.reduced[node]
                at = body.cell("double", tables["reductions"], width, "%row", column)
                values[node] = body.emit(f"load double, ptr {at}")
            elif node.op == "group":
                column = names.index(str(node.value))
                at = body.cell("double", tables["hyperparameters"], len(names), group, column)
                values[node] = body.emit(f"load double, ptr {at}")
            elif node.op == "state":
                values[node] = old[str(node.value)]
            elif node.op == "numel":
                values[node] = body.item("double", tables["numels"], "%row")
            elif node.op == "extent":
                size = body.shape("%row", EXTENTS[int(node.value or 0)])
                values[node] = body.emit(f"sitofp i64 {size} to double")
            elif node.op == "const":
                values[node] = llvm.constant(float(node.value or 0), "double")
            else:
                values[node] = body.operation(node.op, *(values[arg] for arg in node.args))
        return values

    def _fill(self, body: Body, kind: str, numbers: str, values: dict[Expr, str]) -> None:
        for node, column in self.columns.items():
            if node in values:
                value = values[node]
                value = body.as_number(value) if node.is_boolean else value
                at = body.cell(kind, numbers, len(self.columns), "%row", column)
                body.do(f"store {kind} {body.convert(value, 'double', kind)}, ptr {at}")

    def _remember(
        self, body: Body, memory: dict[str, str], key: dict[str, str], values: dict[Expr, str]
    ) -> None:
        """Note what a row was computed from, and the new state."""
        body.do(f"store i64 %row, ptr {memory['row']}")
        for name, value in key.items():
            body.do(f"store {'i64' if name == 'group' else 'double'} {value}, ptr {memory[name]}")
        for name, node in self.scalar_outputs.items() if values else ():
            body.do(f"store double {values[node]}, ptr {memory['new ' + name]}")

    # A sweep over the elements

    def sweep(self, k: int) -> str:
        """sweep_K: the loop over one block of elements."""
        body = Body(self.kind, tames=self.tames)
        reductions = self.reductions_at(k)
        numbers = {
            node: body.tamed(body.item(self.kind, "%numbers", column))
            for node, column in self.columns.items()
        }
        body.do("%some = icmp sgt i64 %count, 0", "br i1 %some, label %loop, label %end", "loop:")
        body.do("%i = phi i64 [ 0, %0 ], [ %i1, %loop ]")
        for j, node in enumerate(reductions):
            body.do(f"%sum{j} = phi double [ {REDUCE[node.op][0]}, %0 ], [ %more{j}, %loop ]")
        values = self._elements(body, k, numbers)
        for name, node in self.stores_at(k).items():
            body.store(self.dtypes[name], values[node], self._element_address(body, name))
        for j, node in enumerate(reductions):
            value = body.convert(values[node.args[0]], self.kind, "double")
            body.do(f"%more{j} = {REDUCE[node.op][1].format(f'%sum{j}', value)}")
        body.do("%i1 = add nuw nsw i64 %i, 1", "%again = icmp slt i64 %i1, %count")
        body.do("br i1 %again, label %loop, label %end", "end:")
        for j, node in enumerate(reductions):
            body.do(f"%all{j} = phi double [ {REDUCE[node.op][0]}, %0 ], [ %more{j}, %loop ]")
        for j, node in enumerate(reductions):
            at = body.address("double", "%partials", self.reduced[node])
            body.do(f"store double %all{j}, ptr {at}")
        body.do("ret void")
        slots = "".join(f"ptr noalias %{name}, " for name in self.elements)
        return body.function(
            f"void @sweep_{k}({slots}ptr noalias %numbers, ptr noalias %partials, i64 %count)"
        )

    def _element_address(self, body: Body, name: str) -> str:
        return body.address(MEMORY[self.dtypes[name]].type, f"%{name}", "%i")

    def _elements(self, body: Body, k: int, numbers: dict[Expr, str]) -> dict[Expr, str]:
        values: dict[Expr, str] = {}
        for node in self.wanted(k):
            if node.kind is not Kind.ELEMENT:
                values[node] = self._number(body, node, numbers)
            elif node.op in LEAVES:
                name = str(node.value)
                values[node] = body.load(self.dtypes[name], self._element_address(body, name))
            else:
                values[node] = body.operation(node.op, *(values[arg] for arg in node.args))
        return values

    def _number(self, body: Body, node: Expr, numbers: dict[Expr, str]) -> str:
        """A value that holds for all elements, as an operation on elements takes it."""
        if node.op == "const":
            return llvm.constant(float(node.value or 0), self.kind)
        return body.truth(numbers[node]) if node.is_boolean else numbers[node]

    def block(self, k: int) -> str:
        """block_K: find the memory of one block and sweep over it."""
        body = Body(self.kind)
        rows = body.word("rows")
        addresses, blocks = body.pointer("addresses"), body.pointer("blocks")
        row, start, size, grad_start = (
            body.emit(f"load i64, ptr {body.cell('i64', blocks, 4, '%block', j)}") for j in range(4)
        )
        # an absent parameter has no elements: its reductions are those of an empty one
        absent = self._is_absent(body, addresses, rows, row)
        size = body.emit(f"select i1 {absent}, i64 0, i64 {size}")
        arguments = []
        for name in self.elements:
            before = body.emit(f"mul i64 {rows}, {self.slots.index(name)}")
            at = body.emit(f"add i64 {before}, {row}")
            base, begin = body.item("ptr", addresses, at), grad_start if name == "grad" else start
            arguments.append("ptr " + body.address(MEMORY[self.dtypes[name]].type, base, begin))
        numbers = body.cell(self.kind, body.pointer("numbers"), len(self.columns), row, 0)
        partials = body.cell("double", body.pointer("partials"), len(self.reduced), "%block", 0)
        arguments += [f"ptr {numbers}", f"ptr {partials}", f"i64 {size}"]
        body.do(f"call void @sweep_{k}({', '.join(arguments)})", "ret void")
        return body.function(f"void @block_{k}(ptr %context, i64 %block)")

    def reduce(self, k: int) -> str:
        """reduce_K: per parameter, join what sweep K found in its blocks, in their order."""
        body = Body()
        rows, width = body.word("rows"), len(self.reduced)
        partials, found = body.pointer("partials"), body.pointer("reductions")
        first = body.pointer("first_block")
        body.do("br label %next", "next:", "%row = phi i64 [ 0, %0 ], [ %row1, %done ]")
        body.do(f"%over = icmp eq i64 %row, {rows}", "br i1 %over, label %end, label %work")
        body.do("work:")
        start = body.item("i64", first, "%row")
        stop = body.item("i64", first, body.emit("add i64 %row, 1"))
        body.do("br label %blocks", "blocks:")
        body.do(f"%block = phi i64 [ {start}, %work ], [ %block1, %join ]")
        for j, node in enumerate(self.reductions_at(k)):
            body.do(f"%sum{j} = phi double [ {REDUCE[node.op][0]}, %work ], [ %more{j}, %join ]")
        body.do(f"%empty = icmp eq i64 %block, {stop}")
        body.do("br i1 %empty, label %done, label %join", "join:")
        for j, node in enumerate(self.reductions_at(k)):
            at = body.cell("double", partials, width, "%block", self.reduced[node])
            part = body.emit(f"load double, ptr {at}")
            body.do(f"%more{j} = {REDUCE[node.op][1].format(f'%sum{j}', part)}")
        body.do("%block1 = add i64 %block, 1", "br label %blocks", "done:")
        for j, node in enumerate(self.reductions_at(k)):
            at = body.cell("double", found, width, "%row", self.reduced[node])
            body.do(f"store double %sum{j}, ptr {at}")
        body.do("%row1 = add i64 %row, 1", "br label %next", "end:", "ret void")
        return body.function(f"void @reduce_{k}(ptr %context)")

    def run(self) -> str:
        """run(context, first, last): the sweeps from `first` up to `last`, not included."""
        body = Body()
        for k in range(self.sweeps):
            after = body.emit(f"icmp sle i64 %first, {k}")
            before = body.emit(f"icmp sgt i64 %last, {k}")
            body.do(f"br i1 {body.emit(f'and i1 {after}, {before}')}, label %do{k}, label %skip{k}")
            body.do(f"do{k}:", *(f"call void @{name}(ptr %context)" for name in self.calls(k)))
            body.do(f"br label %skip{k}", f"skip{k}:")
        body.do("ret void")
        return body.function("void @run(ptr %context, i64 %first, i64 %last)", linkage="")


def _share(k: int, runtime: Runtime | None) -> str:
    """share_K: all blocks on this thread, or each thread's part of them on torch's threads.

    A part is a number of `bounds`; a team smaller than asked for takes several parts each.
    """
    part = Body()
    part.do("br label %next", "next:", "%i = phi i64 [ %from, %0 ], [ %i1, %work ]")
    part.do("%over = icmp sge i64 %i, %to", "br i1 %over, label %end, label %work", "work:")
    part.do(f"call void @block_{k}(ptr %context, i64 %i)", "%i1 = add i64 %i, 1")
    part.do("br label %next", "end:", "ret void")
    functions = [part.function(f"void @part_{k}(ptr %context, i64 %from, i64 %to)")]

    share = Body()
    threads, bounds = share.word("threads"), share.pointer("bounds")
    end = share.item("i64", bounds, threads)
    if runtime is None:
        share.do(f"call void @part_{k}(ptr %context, i64 0, i64 {end})", "ret void")
        return "\n".join([*functions, share.function(f"void @share_{k}(ptr %context)")])

    team = Body()
    bounds, wanted = team.pointer("bounds"), team.word("threads")
    number = team.emit(f"call i32 inttoptr (i64 {runtime.thread_number} to ptr)()")
    size = team.emit(f"call i32 inttoptr (i64 {runtime.team_size} to ptr)()")
    first = team.emit(f"zext i32 {number} to i64")
    stride = team.emit(f"zext i32 {size} to i64")
    team.do("br label %next", "next:", f"%t = phi i64 [ {first}, %0 ], [ %t1, %work ]")
    team.do(f"%over = icmp sge i64 %t, {wanted}", "br i1 %over, label %end, label %work", "work:")
    start = team.item("i64", bounds, "%t")
    stop = team.item("i64", bounds, team.emit("add i64 %t, 1"))
    team.do(f"call void @part_{k}(ptr %context, i64 {start}, i64 {stop})")
    team.do(f"%t1 = add i64 %t, {stride}", "br label %next", "end:", "ret void")
    functions.append(team.function(f"void @team_{k}(ptr %context)"))

    alone = share.emit(f"icmp sle i64 {threads}, 1")
    share.do(f"br i1 {alone}, label %alone, label %together", "alone:")
    share.do(f"call void @part_{k}(ptr %context, i64 0, i64 {end})", "ret void", "together:")
    wanted = share.emit(f"trunc i64 {threads} to i32")
    share.do(
        f"call void inttoptr (i64 {runtime.parallel} to ptr)"
        f"(ptr @team_{k}, ptr %context, i32 {wanted}, i32 0)",
        "ret void",
    )
    functions.append(share.function(f"void @share_{k}(ptr %context)"))
    return "\n".join(functions)
