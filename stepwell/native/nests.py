"""Programs with values per row, column or matrix -> LLVM IR: nests of two loops.

nest_OVER_K  an outer and an inner loop, over rows and their elements, matrices and their rows
             or columns, or all matrices; it computes, stores and reduces
gather_OP    joins what was summed over the rows of each part of a matrix
slices_K     for each parameter: what is known per matrix, row and column before sweep K
"""

from __future__ import annotations

from ..language.expr import ALONG, REDUCTIONS, Expr, Kind
from .assembly import MEMORY, Body
from .lowering import REDUCE
from .openmp import Runtime
from .slices import COLUMNS, ELEMENTS, MATRICES, NAMES, ROWS, SLICES, Over, Slices

__all__ = ["SlicedLowering"]

INNER = {ELEMENTS: "m", ROWS: "n", COLUMNS: "m", MATRICES: "matrices"}
"""How far the inner loop goes."""

# Where the inner loop of the first begins in an array of the second.
STARTS: dict[tuple[Over, Over], str] = {
    (ELEMENTS, ELEMENTS): "mul i64 %o, %m",
    (ELEMENTS, COLUMNS): "mul i64 %matrix, %m",
    (ROWS, ROWS): "mul i64 %o, %n",
    (COLUMNS, COLUMNS): "mul i64 %o, %m",
    (MATRICES, MATRICES): "mul i64 0, 0",
}
# What numbers an array that holds one value for all of the inner loop.
NUMBERS: dict[tuple[Over, Over], str] = {
    (ELEMENTS, ROWS): "%o",
    (ELEMENTS, MATRICES): "%matrix",
    (ROWS, MATRICES): "%o",
    (COLUMNS, MATRICES): "%o",
}


class SlicedLowering(Slices):
    """Its functions: those of `Lowering`, with nests for sweeps, and `slices_K` before them."""

    def module(self, runtime: Runtime | None) -> str:
        """All functions, up to `run`."""
        levels = [k for k in range(self.sweeps + 1) if self.has_slices(k)]
        parts = [self.nest(over, k) for over in SLICES for k in levels if self.has_nest(over, k)]
        parts += [_gather(op, self.kind) for op in sorted({node.op for node in self.stacks})]
        return "\n".join([super().module(runtime), *parts, *map(self.slices, levels)])

    def calls(self, k: int) -> list[str]:
        """The functions of sweep k, in their order."""
        rows, *rest = super().calls(k)
        last = [f"slices_{k + 1}"] if k == self.sweeps - 1 and self.has_slices(k + 1) else []
        return [rows, *([f"slices_{k}"] if self.has_slices(k) else []), *rest, *last]

    def sweep(self, k: int) -> str:
        """The loops over the elements of some rows."""
        return self.nest(ELEMENTS, k)

    def nest(self, over: Over, k: int) -> str:
        """nest_OVER_K: an outer and an inner loop."""
        return Nest(self, over, k).function()

    def call_nest(
        self, body: Body, over: Over, k: int, row: str, bounds: tuple[str, str], partials: str
    ) -> None:
        """Call a nest for one parameter."""
        places = [self._place_of(body, name, row) for name in self.arrays(over, k)]
        stacks = [n for n in self.reductions(over, k) if n in self.stacks]
        places += [self._stack(body, node, row) for node in stacks]
        numbers = body.cell(self.kind, body.pointer("numbers"), len(self.columns), row, 0)
        pointers = ", ".join(f"ptr {place}" for place in (*places, numbers, partials))
        sizes = [body.shape(row, name) for name in ("m", "n", "part", "parts", INNER[over])]
        integers = ", ".join(f"i64 {size}" for size in (*sizes, *bounds))
        body.do(f"call void @nest_{NAMES[over]}_{k}({pointers}, {integers})")

    def _place_of(self, body: Body, name: str, row: str) -> str:
        """Where an array of a parameter begins."""
        if name in self.elements:
            before = body.emit(f"mul i64 {body.word('rows')}, {self.slots.index(name)}")
            return body.item(
                "ptr", body.pointer("addresses"), body.emit(f"add i64 {before}, {row}")
            )
        start, number = "0", int(name.removeprefix("kept"))
        for over in SLICES:
            count = sum(node.over == over for node in list(self.kept)[:number])
            size = body.emit(f"mul i64 {body.shape(row, NAMES[over])}, {count}")
            start = body.emit(f"add i64 {start}, {size}")
        base = body.item("ptr", body.pointer("scratch"), row)
        return body.address(self.kind, base, start)

    def _stack(self, body: Body, node: Expr, row: str) -> str:
        """Where the sums of the parts of a parameter begin."""
        size = body.emit(f"mul i64 {body.shape(row, 'columns')}, {body.shape(row, 'parts')}")
        base = body.item("ptr", body.pointer("stacks"), row)
        return body.address("double", base, body.emit(f"mul i64 {size}, {self.stacks[node]}"))

    def block(self, k: int) -> str:
        """block_K: sweep over the rows of one block."""
        body = Body(self.kind)
        blocks = body.pointer("blocks")
        row, start, count = (
            body.emit(f"load i64, ptr {body.cell('i64', blocks, 4, '%block', j)}") for j in range(3)
        )
        absent = self._is_absent(body, body.pointer("addresses"), body.word("rows"), row)
        stop = body.emit(f"add i64 {start}, {count}")
        stop = body.emit(f"select i1 {absent}, i64 {start}, i64 {stop}")
        width = len(self.reduced)
        partials = body.cell("double", body.pointer("partials"), width, "%block", 0)
        self.call_nest(body, ELEMENTS, k, row, (start, stop), partials)
        body.do("ret void")
        return body.function(f"void @block_{k}(ptr %context, i64 %block)")

    def slices(self, k: int) -> str:
        """slices_K: for each parameter, what is known per slice before sweep K."""
        body = Body(self.kind)
        rows, addresses = body.word("rows"), body.pointer("addresses")
        body.do("br label %next", "next:", "%row = phi i64 [ 0, %0 ], [ %row1, %advance ]")
        body.do(f"%over = icmp eq i64 %row, {rows}", "br i1 %over, label %end, label %present")
        body.do("present:")
        absent = self._is_absent(body, addresses, rows, "%row")
        body.do(f"br i1 {absent}, label %advance, label %work", "work:")
        for node in (node for node in self.stacks if self.passes[node] == k):
            stack, to = (
                self._stack(body, node, "%row"),
                self._place_of(body, self.name_of(node), "%row"),
            )
            sizes = [body.shape("%row", name) for name in ("m", "matrices", "parts")]
            integers = ", ".join(f"i64 {size}" for size in sizes)
            body.do(f"call void @gather_{node.op}(ptr {stack}, ptr {to}, {integers})")
        found = body.cell("double", body.pointer("reductions"), len(self.reduced), "%row", 0)
        for over in (over for over in SLICES if self.has_nest(over, k)):
            end = "1" if over == MATRICES else body.shape("%row", "matrices")
            self.call_nest(body, over, k, "%row", ("0", end), found)
        body.do("br label %advance", "advance:")
        body.do("%row1 = add i64 %row, 1", "br label %next", "end:", "ret void")
        return body.function(f"void @slices_{k}(ptr %context)")


class Nest:
    """One nest of loops while it is written; `over` is what one value is computed per."""

    def __init__(self, lowering: Slices, over: Over, k: int) -> None:
        self.lowering, self.over, self.k = lowering, over, k
        self.body = Body(lowering.kind, tames=lowering.tames)
        self.arrays = lowering.arrays(over, k)
        reductions = lowering.reductions(over, k)
        self.stacked = [node for node in reductions if node in lowering.stacks]
        self.along = [n for n in reductions if n.op in ALONG and n not in lowering.stacks]
        self.whole = [node for node in reductions if node.op in REDUCTIONS]
        self.values: dict[Expr, str] = {}
        self.starts: dict[str, str] = {}

    def function(self) -> str:
        """The finished function."""
        body, wanted = self.body, self.lowering.wanted_by(self.over, self.k)
        self._read_numbers(wanted)
        body.do("%some = icmp slt i64 %first, %last", "br i1 %some, label %outer, label %end")
        body.do("outer:", "%o = phi i64 [ %first, %0 ], [ %o1, %after ]")
        for j, node in enumerate(self.whole):
            body.do(f"%sum{j} = phi double [ {_start(node)}, %0 ], [ %more{j}, %after ]")
        body.do("%matrix = " + ("udiv i64 %o, %n" if self.over == ELEMENTS else "add i64 %o, 0"))
        self._find_places(wanted)
        body.do("%any = icmp sgt i64 %inner, 0", "br i1 %any, label %loop, label %after", "loop:")
        self._loop(wanted)
        body.do("after:")
        for j, node in enumerate(self.along):
            body.do(f"%along{j} = phi double [ {_start(node)}, %outer ], [ %a{j}_, %loop ]")
        for j in range(len(self.whole)):
            body.do(f"%more{j} = phi double [ %sum{j}, %outer ], [ %w{j}_, %loop ]")
        for j, node in enumerate(self.along):
            self._store_outer(node, f"%along{j}")
        body.do("%o1 = add nuw nsw i64 %o, 1", "%again = icmp slt i64 %o1, %last")
        body.do("br i1 %again, label %outer, label %end", "end:")
        for j, node in enumerate(self.whole):
            body.do(f"%all{j} = phi double [ {_start(node)}, %0 ], [ %more{j}, %after ]")
        for j, node in enumerate(self.whole):
            at = body.address("double", "%partials", self.lowering.reduced[node])
            body.do(f"store double %all{j}, ptr {at}")
        body.do("ret void")
        return body.function(f"void @nest_{NAMES[self.over]}_{self.k}({self._arguments()})")

    def _arguments(self) -> str:
        stacks = (f"stack{self.lowering.stacks[node]}" for node in self.stacked)
        pointers = (f"ptr noalias %{n}" for n in (*self.arrays, *stacks, "numbers", "partials"))
        integers = ("m", "n", "part", "parts", "inner", "first", "last")
        return ", ".join([*pointers, *(f"i64 %{name}" for name in integers)])

    def _read_numbers(self, wanted: list[Expr]) -> None:
        body, columns = self.body, self.lowering.columns
        read = [node for node in wanted if node in columns]
        numbers = {
            node: body.tamed(body.item(body.kind, "%numbers", columns[node])) for node in read
        }
        for node in wanted:
            if node.kind is not Kind.ELEMENT:
                self.values[node] = self.lowering._number(body, node, numbers)

    def _find_places(self, wanted: list[Expr]) -> None:
        """In the outer loop: where the inner one begins in each array, and what holds all along."""
        body, lowering = self.body, self.lowering
        known = {lowering.name_of(n): n for n in wanted if n.kind is Kind.ELEMENT}
        for name in self.arrays:
            over, _ = self.lowering.array(name)
            if (self.over, over) in STARTS:
                start = body.emit(STARTS[self.over, over])
                self.starts[name] = body.address(self._type(name), f"%{name}", start)
            elif name in known:
                self.values[known[name]] = self._load(known[name], f"%{name}", self._number(over))
        if self.stacked:
            body.do("%inside = urem i64 %o, %n", "%offset = urem i64 %inside, %part")
            body.do("%fresh = icmp eq i64 %offset, 0", "%which = udiv i64 %inside, %part")
            body.do("%before = mul i64 %matrix, %parts", "%stack = add i64 %before, %which")
            body.do("%start = mul i64 %stack, %m")
        for node in self.stacked:
            name = f"stack{self.lowering.stacks[node]}"
            self.starts[name] = body.address("double", f"%{name}", "%start")

    def _number(self, over: Over) -> str:
        return NUMBERS[self.over, over]

    def _loop(self, wanted: list[Expr]) -> None:
        """The inner loop."""
        body, lowering = self.body, self.lowering
        body.do("%i = phi i64 [ 0, %outer ], [ %i1, %loop ]")
        for j, node in enumerate(self.along):
            body.do(f"%a{j} = phi double [ {_start(node)}, %outer ], [ %a{j}_, %loop ]")
        for j in range(len(self.whole)):
            body.do(f"%w{j} = phi double [ %sum{j}, %outer ], [ %w{j}_, %loop ]")
        for node in wanted:
            if node in self.values:
                continue
            if lowering.is_computed(node, self.over, self.k):
                arguments = (self.values[arg] for arg in node.args)
                self.values[node] = body.operation(node.op, *arguments)
            else:
                start = self.starts[lowering.name_of(node)]
                self.values[node] = self._load(node, start, "%i")
        for name, node in lowering.stores(self.over, self.k).items():
            self._store(node, name, self.starts[name], "%i", self.values[node])
        for node in self.stacked:
            at = body.address("double", self.starts[f"stack{lowering.stacks[node]}"], "%i")
            old = body.emit(f"load double, ptr {at}")
            old = body.emit(f"select i1 %fresh, double {_start(node)}, double {old}")
            joined = body.emit(_joined(node, old, self._wide(node)))
            body.do(f"store double {joined}, ptr {at}")
        for letter, nodes in (("a", self.along), ("w", self.whole)):
            for j, node in enumerate(nodes):
                body.do(f"%{letter}{j}_ = {_joined(node, f'%{letter}{j}', self._wide(node))}")
        body.do("%i1 = add nuw nsw i64 %i, 1", "%more = icmp slt i64 %i1, %inner")
        body.do("br i1 %more, label %loop, label %after")

    def _wide(self, node: Expr) -> str:
        return self.body.convert(self.values[node.args[0]], self.body.kind, "double")

    def _type(self, name: str) -> str:
        dtype = self.lowering.array(name)[1]
        return self.body.kind if dtype is None else MEMORY[dtype].type

    def _load(self, node: Expr, start: str, index: str) -> str:
        body, name = self.body, self.lowering.name_of(node)
        at, dtype = body.address(self._type(name), start, index), self.lowering.array(name)[1]
        if dtype is not None:
            return body.load(dtype, at)
        value = body.emit(f"load {body.kind}, ptr {at}")
        return body.truth(value) if node.is_boolean else value

    def _store(self, node: Expr, name: str, start: str, index: str, value: str) -> None:
        body, dtype = self.body, self.lowering.array(name)[1]
        at = body.address(self._type(name), start, index)
        if dtype is not None:
            body.store(dtype, value, at)
        else:
            value = body.as_number(value) if node.is_boolean else value
            body.do(f"store {body.kind} {value}, ptr {at}")

    def _store_outer(self, node: Expr, value: str) -> None:
        """Write down what the inner loop has added up."""
        name, body = self.lowering.name_of(node), self.body
        value = body.convert(value, "double", body.kind)
        self._store(node, name, f"%{name}", self._number(node.over), value)


def _start(node: Expr) -> str:
    return REDUCE[node.op.removesuffix("_dim")][0]


def _joined(node: Expr, a: str, b: str) -> str:
    return REDUCE[node.op.removesuffix("_dim")][1].format(a, b)


def _gather(op: str, kind: str) -> str:
    """gather_OP: join the parts of each matrix, in their order, and write down the results."""
    template = REDUCE[op.removesuffix("_dim")][1]
    body = Body(kind)
    body.do("%size = mul i64 %m, %parts", "br label %matrix", "matrix:")
    body.do("%b = phi i64 [ 0, %0 ], [ %b1, %done ]", "%out = icmp eq i64 %b, %matrices")
    body.do("br i1 %out, label %end, label %first", "first:")
    stack = body.address("double", "%stack", body.emit("mul i64 %b, %size"))
    to = body.address(kind, "%to", body.emit("mul i64 %b, %m"))
    body.do("br label %part", "part:", "%q = phi i64 [ 1, %first ], [ %q1, %joined ]")
    body.do("%over = icmp sge i64 %q, %parts", "br i1 %over, label %write, label %other", "other:")
    other = body.address("double", stack, body.emit("mul i64 %q, %m"))
    body.do("br label %join", "join:", "%i = phi i64 [ 0, %other ], [ %i1, %join ]")
    at = body.address("double", stack, "%i")
    joined = body.emit(
        template.format(body.emit(f"load double, ptr {at}"), body.item("double", other, "%i"))
    )
    body.do(f"store double {joined}, ptr {at}", "%i1 = add i64 %i, 1")
    body.do("%more = icmp slt i64 %i1, %m", "br i1 %more, label %join, label %joined", "joined:")
    body.do("%q1 = add i64 %q, 1", "br label %part", "write:")
    body.do("%j = phi i64 [ 0, %part ], [ %j1, %write ]")
    value = body.convert(body.item("double", stack, "%j"), "double", kind)
    body.do(f"store {kind} {value}, ptr {body.address(kind, to, '%j')}", "%j1 = add i64 %j, 1")
    body.do("%again = icmp slt i64 %j1, %m", "br i1 %again, label %write, label %done", "done:")
    body.do("%b1 = add i64 %b, 1", "br label %matrix", "end:", "ret void")
    arguments = "ptr noalias %stack, ptr noalias %to, i64 %m, i64 %matrices, i64 %parts"
    return body.function(f"void @gather_{op}({arguments})")
