"""The instructions that kernels are made of: LLVM IR by tables, and a function being written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

import torch

from . import llvm

__all__ = ["CONTEXT", "EXTENTS", "MEMORY", "OPS", "SHAPE", "Body", "Memory", "declarations"]

# LLVM instructions per operation, the last one being the result. {0}, {1}, {2}: arguments;
# {t}: their type; {s}: its suffix in intrinsics; {a}, {b}, ...: the lines before.
OPS = {
    "add": ["fadd {t} {0}, {1}"],
    "sub": ["fsub {t} {0}, {1}"],
    "mul": ["fmul {t} {0}, {1}"],
    "div": ["fdiv {t} {0}, {1}"],
    "neg": ["fneg {t} {0}"],
    "abs": ["call {t} @llvm.fabs.{s}({t} {0})"],
    "sqrt": ["call {t} @llvm.sqrt.{s}({t} {0})"],
    "pow": ["call {t} @llvm.pow.{s}({t} {0}, {t} {1})"],
    "exp": ["call {t} @llvm.exp.{s}({t} {0})"],
    "log": ["call {t} @llvm.log.{s}({t} {0})"],
    "atan2": ["call {t} @llvm.atan2.{s}({t} {0}, {t} {1})"],
    "floor": ["call {t} @llvm.floor.{s}({t} {0})"],
    "fma": ["call {t} @llvm.fma.{s}({t} {0}, {t} {1}, {t} {2})"],
    "maximum": ["call {t} @llvm.maximum.{s}({t} {0}, {t} {1})"],
    "minimum": ["call {t} @llvm.minimum.{s}({t} {0}, {t} {1})"],
    "sign": [
        "fcmp olt {t} {0}, 0.0",
        "select i1 {a}, {t} -1.0, {t} 0.0",
        "fcmp ogt {t} {0}, 0.0",
        "select i1 {c}, {t} 1.0, {t} {b}",
    ],
    "isfinite": ["call {t} @llvm.fabs.{s}({t} {0})", "fcmp olt {t} {a}, 0x7FF0000000000000"],
    "lt": ["fcmp olt {t} {0}, {1}"],
    "le": ["fcmp ole {t} {0}, {1}"],
    "gt": ["fcmp ogt {t} {0}, {1}"],
    "ge": ["fcmp oge {t} {0}, {1}"],
    "eq": ["fcmp oeq {t} {0}, {1}"],
    "ne": ["fcmp une {t} {0}, {1}"],
    "and": ["and i1 {0}, {1}"],
    "or": ["or i1 {0}, {1}"],
    "not": ["xor i1 {0}, true"],
    "where": ["select i1 {0}, {t} {1}, {t} {2}"],
}
# The same bits as fma only where a * b is exact, but a library call per element is no way out.
WITHOUT_FMA = {"fma": ["fmul {t} {0}, {1}", "fadd {t} {a}, {2}"]}


@dataclass(frozen=True)
class Memory:
    """How a dtype lies in memory, and the instructions from there to float and back.

    `encode_tame` will do where no NaN has bits in the half that is rounded away.
    """

    type: str
    size: int
    decode: tuple[str, ...] = ()
    encode: tuple[str, ...] = ()
    encode_tame: tuple[str, ...] = ()


TO_NEAREST_EVEN = (
    "bitcast float {0} to i32",
    "lshr i32 {a}, 16",
    "and i32 {b}, 1",
    "add i32 {c}, 32767",
    "add i32 {a}, {d}",
    "lshr i32 {e}, 16",
)


MEMORY = {
    torch.float32: Memory("float", 4),
    torch.float64: Memory("double", 8),
    torch.float16: Memory("half", 2, ("fpext half {0} to float",), ("fptrunc float {0} to half",)),
    # by integers: round to nearest even, and keep a NaN a NaN
    torch.bfloat16: Memory(
        "i16",
        2,
        ("zext i16 {0} to i32", "shl i32 {a}, 16", "bitcast i32 {b} to float"),
        (
            *TO_NEAREST_EVEN,
            "fcmp uno float {0}, 0.0",
            "or i32 {b}, 64",
            "select i1 {g}, i32 {h}, i32 {f}",
            "trunc i32 {i} to i16",
        ),
        (*TO_NEAREST_EVEN, "trunc i32 {f} to i16"),
    ),
}

# What is rounded up past the last NaN becomes -0: a NaN from wider memory loses its lower bits.
TAME = (
    "bitcast float {0} to i32",
    "and i32 {a}, -65536",
    "or i32 {b}, 4194304",
    "bitcast i32 {c} to float",
    "fcmp uno float {0}, 0.0",
    "select i1 {e}, float {d}, float {0}",
)

# The words of the table that `run` is given; all are 64 bits wide.
CONTEXT = (
    "rows",
    "addresses",
    "hyperparameters",
    "groups",
    "numbers",
    "blocks",
    "partials",
    "reductions",
    "first_block",
    "numels",
    "bounds",
    "threads",
    "shapes",
    "scratch",
    "stacks",
)

# The columns of the table of shapes: the size of the last dimension and of the one before, how
# many rows, columns and matrices that makes in all, how many rows a part of a matrix has, and how
# many parts a matrix.
SHAPE = ("m", "n", "rows", "columns", "matrices", "part", "parts")
EXTENTS = {-1: "m", -2: "n"}


def declarations() -> str:
    """The intrinsics that instructions may call."""
    lines = [
        f"declare {t} @llvm.{name}.{s}({', '.join([t] * arity)})"
        for t, s in (("float", "f32"), ("double", "f64"))
        for name, arity in INTRINSICS.items()
    ]
    return "\n".join([*lines, MEMCPY, ""])


MEMCPY = "declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)"
INTRINSICS = {
    "fabs": 1,
    "floor": 1,
    "sqrt": 1,
    "exp": 1,
    "log": 1,
    "pow": 2,
    "atan2": 2,
    "maximum": 2,
    "minimum": 2,
    "fma": 3,
}


# Instructions whose result depends on nothing but their operands.
ADDRESSING = ("add ", "mul ", "getelementptr ")


class Body:
    """The instructions of one function while they are written.

    With `tames` no NaN has lower bits, which arithmetic hands on but never makes.
    """

    def __init__(self, kind: str = "double", *, tames: bool = False) -> None:
        self.kind = kind
        self._tames = tames
        self.lines: list[str] = []
        self._names = count()
        self._addresses: dict[str, str] = {}

    def emit(self, instruction: str) -> str:
        """Add an instruction that has a result, unless it is there; returns its name."""
        # most of the time of compiling would go into finding these again
        if instruction in self._addresses:
            return self._addresses[instruction]
        name = f"%v{next(self._names)}"
        self.lines.append(f"  {name} = {instruction}")
        if instruction.startswith(ADDRESSING):
            self._addresses[instruction] = name
        return name

    def emit_all(self, templates: Iterable[str], *args: str) -> str:
        """Add the instructions of a table; returns the last result (without any, the argument)."""
        between: dict[str, str] = {"t": self.kind, "s": "f64" if self.kind == "double" else "f32"}
        result = args[0]
        for letter, template in zip("abcdefghij", templates, strict=False):
            result = between[letter] = self.emit(template.format(*args, **between))
        return result

    def do(self, *lines: str) -> None:
        """Add instructions without a result, and labels."""
        for line in lines:
            self.lines.append(line if line.endswith(":") else f"  {line}")
            if line.endswith(":"):
                self._addresses.clear()

    def operation(self, op: str, *args: str) -> str:
        """Add an operation of a formula."""
        table = OPS if op != "fma" or _has_fma() else WITHOUT_FMA
        return self.emit_all(table[op], *args)

    def address(self, kind: str, base: str, index: str | int) -> str:
        """The address of item `index` of an array."""
        return self.emit(f"getelementptr {kind}, ptr {base}, i64 {index}")

    def item(self, kind: str, base: str, index: str | int) -> str:
        """Item `index` of an array."""
        return self.emit(f"load {kind}, ptr {self.address(kind, base, index)}")

    def word(self, name: str) -> str:
        """A word of the context, as an integer."""
        return self.item("i64", "%context", CONTEXT.index(name))

    def pointer(self, name: str) -> str:
        """A word of the context, as an address."""
        return self.item("ptr", "%context", CONTEXT.index(name))

    def shape(self, row: str, name: str) -> str:
        """An entry of the table of shapes."""
        table = self.pointer("shapes")
        return self.emit(
            f"load i64, ptr {self.cell('i64', table, len(SHAPE), row, SHAPE.index(name))}"
        )

    def truth(self, value: str) -> str:
        """A number that stands for the outcome of a comparison, as such."""
        return self.emit(f"fcmp une {self.kind} {value}, 0.0")

    def as_number(self, value: str) -> str:
        """The outcome of a comparison as a number."""
        return self.emit(f"uitofp i1 {value} to {self.kind}")

    def cell(self, kind: str, base: str, width: int, row: str, column: int) -> str:
        """The address of an entry of a table with `width` columns."""
        start = self.address(kind, base, self.emit(f"mul i64 {row}, {width}"))
        return self.address(kind, start, column) if column else start

    def load(self, dtype: torch.dtype, at: str) -> str:
        """Read one element, in the kind of this function."""
        memory = MEMORY[dtype]
        value = self.emit_all(memory.decode, self.emit(f"load {memory.type}, ptr {at}"))
        value = self.convert(value, "double" if memory.size == 8 else "float", self.kind)
        return value if memory.encode_tame else self.tamed(value)

    def store(self, dtype: torch.dtype, value: str, at: str) -> None:
        """Round and write one element."""
        memory = MEMORY[dtype]
        value = self.convert(value, self.kind, "double" if memory.size == 8 else "float")
        encode = (self._tames and memory.encode_tame) or memory.encode
        self.do(f"store {memory.type} {self.emit_all(encode, value)}, ptr {at}")

    def tamed(self, value: str) -> str:
        """A number from outside as this function may use it."""
        return self.emit_all(TAME, value) if self._tames else value

    def convert(self, value: str, have: str, want: str) -> str:
        """Widen or round between float and double."""
        if have == want:
            return value
        word = "fpext" if want == "double" else "fptrunc"
        return self.emit(f"{word} {have} {value} to {want}")

    def function(self, signature: str, linkage: str = "internal") -> str:
        """The finished function."""
        # inlined, each would be optimised again with every caller, and calls cost next to nothing
        return "\n".join([f"define {linkage} {signature} noinline {{", *self.lines, "}", ""])


def _has_fma() -> bool:
    return not llvm.features().isdisjoint({"fma", "neon"})
