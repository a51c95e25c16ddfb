"""Expr: a node of a traced formula, built with Python's own arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any, NoReturn

from .number import divide, power

__all__ = ["Expr", "Graph", "Kind"]


class Kind(IntEnum):
    """Where a value lives; an operation has the largest kind among its arguments."""

    SCALAR = 0
    """One number per parameter, known before the parameter's elements are read."""
    REDUCED = 1
    """One number per parameter, known after a pass over elements, of it or of others."""
    ELEMENT = 2
    """One number per element."""


COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
LOGICAL = frozenset({"and", "or", "not"})
BOOLEAN = COMPARISONS | LOGICAL | {"isfinite"}
REDUCTIONS = frozenset({"sum", "amax"})
ALONG = frozenset({"sum_dim", "amax_dim"})
"""Reductions over one dimension, which stays with size 1."""


class Expr:
    """One value of a formula while it is traced.

    It answers to Python's arithmetic and comparisons by adding a node to its graph. It has no
    value yet, so Python's `if`, `and`, `or`, `not` and `float()` refuse it and name `where`.

    Of elements, `over` names the dimensions that have size 1, counted from the last: (-1,) is a
    number per row, (-2, -1) one per matrix.
    """

    __slots__ = ("args", "graph", "index", "kind", "op", "over", "value")

    def __init__(
        self,
        graph: Graph,
        op: str,
        args: tuple[Expr, ...],
        value: float | str | None,
        kind: Kind,
        index: int,
        over: tuple[int, ...] = (),
    ) -> None:
        self.graph = graph
        self.op = op
        self.args = args
        self.value = value
        self.kind = kind
        self.index = index
        self.over = over

    @property
    def ndim(self) -> int:
        """How many dimensions the parameter has: a formula may branch on it."""
        if self.kind is not Kind.ELEMENT:
            raise AttributeError(f"{self.graph.owner}.update: one number has no .ndim")
        self.graph.is_shaped = True
        return self.graph.ndim

    @property
    def is_boolean(self) -> bool:
        """Whether this is the outcome of a comparison: for `where`, not for arithmetic."""
        return self.op in BOOLEAN

    def __repr__(self) -> str:
        inner = ", ".join(f"%{arg.index}" for arg in self.args)
        value = "" if self.value is None else f"[{self.value}]"
        return f"%{self.index} = {self.op}{value}({inner}) : {self.kind.name.lower()}"

    def __add__(self, other: object) -> Expr:
        return self.graph.apply("add", self, other)

    def __radd__(self, other: object) -> Expr:
        return self.graph.apply("add", other, self)

    def __sub__(self, other: object) -> Expr:
        return self.graph.apply("sub", self, other)

    def __rsub__(self, other: object) -> Expr:
        return self.graph.apply("sub", other, self)

    def __mul__(self, other: object) -> Expr:
        return self.graph.apply("mul", self, other)

    def __rmul__(self, other: object) -> Expr:
        return self.graph.apply("mul", other, self)

    def __truediv__(self, other: object) -> Expr:
        return self.graph.apply("div", self, other)

    def __rtruediv__(self, other: object) -> Expr:
        return self.graph.apply("div", other, self)

    def __pow__(self, other: object) -> Expr:
        # x * x is exact where pow() is a library call
        if not isinstance(other, Expr) and other == 2:
            return self * self
        return self.graph.apply("pow", self, other)

    def __rpow__(self, other: object) -> Expr:
        return self.graph.apply("pow", other, self)

    def __neg__(self) -> Expr:
        return self.graph.apply("neg", self)

    def __pos__(self) -> Expr:
        return self

    def __abs__(self) -> Expr:
        return self.graph.apply("abs", self)

    def __lt__(self, other: object) -> Expr:
        return self.graph.apply("lt", self, other)

    def __le__(self, other: object) -> Expr:
        return self.graph.apply("le", self, other)

    def __gt__(self, other: object) -> Expr:
        return self.graph.apply("gt", self, other)

    def __ge__(self, other: object) -> Expr:
        return self.graph.apply("ge", self, other)

    def __eq__(self, other: object) -> Expr:  # type: ignore[override]
        return self.graph.apply("eq", self, other)

    def __ne__(self, other: object) -> Expr:  # type: ignore[override]
        return self.graph.apply("ne", self, other)

    __hash__ = object.__hash__

    def __and__(self, other: object) -> Expr:
        return self.graph.apply("and", self, other)

    def __or__(self, other: object) -> Expr:
        return self.graph.apply("or", self, other)

    def __invert__(self) -> Expr:
        return self.graph.apply("not", self)

    def _no_value(self) -> TypeError:
        return TypeError(
            f"{self.graph.owner}.update: a formula cannot branch on, or turn into a number, a "
            "value that is only known when it runs; use where(condition, a, b), & instead of "
            "`and`, | instead of `or`, and functions of stepwell.language instead of math's"
        )

    def __bool__(self) -> bool:
        if self.index not in self.graph.nonzero:
            raise self._no_value()
        return True

    def __float__(self) -> float:
        raise self._no_value()

    def __int__(self) -> int:
        raise self._no_value()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{self.graph.owner}.update: a value of a formula has no .{name}; use Python's "
            "arithmetic and the functions of stepwell.language (sqrt, norm, where, ...)"
        )

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        owner = next((arg.graph.owner for arg in args if isinstance(arg, Expr)), "a rule")
        name = getattr(function, "__name__", function)
        raise TypeError(
            f"{owner}.update calls torch.{name}; a formula uses Python's arithmetic and the "
            "functions of stepwell.language (sqrt, norm, where, ...), so that it can be compiled"
        )

    def __iter__(self) -> NoReturn:
        raise TypeError(f"{self.graph.owner}.update: a value of a formula cannot be iterated over")


class NoDimensionError(RuntimeError):
    """A formula goes along a dimension that a parameter does not have."""


# What constants fold to; everything else keeps its node.
FOLD: dict[str, Callable[..., float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": divide,
    "neg": operator.neg,
    "pow": power,
}


class Graph:
    """The nodes of one formula, for parameters of `ndim` dimensions; equal nodes are one node.

    Attributes:
        is_shaped: whether anything depends on the number of dimensions
    """

    def __init__(self, owner: str, ndim: int) -> None:
        self.owner = owner
        self.ndim = ndim
        self.is_shaped = False
        self.nodes: list[Expr] = []
        self.nonzero: set[int] = set()
        self.totals: list[Expr] = []
        self._known: dict[object, Expr] = {}

    def leaf(self, op: str, value: float | str, kind: Kind, over: tuple[int, ...] = ()) -> Expr:
        """An input (`param`, `grad`, `state`, `group`, ...) or a constant (`const`)."""
        return self.add(op, (), value, kind, over)

    def constant(self, value: float) -> Expr:
        """A number that is part of the formula."""
        return self.leaf("const", float(value), Kind.SCALAR)

    def apply(self, op: str, *args: object) -> Expr:
        """The node for `op` on these arguments; numbers become constants."""
        nodes = tuple(self._lift(arg) for arg in args)
        self._check_types(op, nodes)
        if op in FOLD and all(node.op == "const" for node in nodes):
            return self.constant(FOLD[op](*(node.value for node in nodes)))
        return self.add(op, nodes, None, max(node.kind for node in nodes))

    def reduce(self, op: str, arg: object, across: str) -> Expr:
        """One number from all elements: of the parameter, its group, or all parameters."""
        node = self._lift(arg)
        if node.kind is not Kind.ELEMENT:
            raise TypeError(f"{self.owner}.update: {op}() reduces elements; this is one number")
        self._check_whole(node, across)
        return self._total(self.add(op, (node,), across, Kind.REDUCED))

    def numel(self, arg: object, across: str) -> Expr:
        """How many elements this has, or such values of the group or of all parameters."""
        node = self._lift(arg)
        self._check_whole(node, across)
        kind = Kind.SCALAR if across == "tensor" else Kind.REDUCED
        count = self._total(self.leaf("numel", across, kind))
        for dim in node.over:
            count = count / self.leaf("extent", dim, Kind.SCALAR)
        return count

    def _check_whole(self, node: Expr, across: str) -> None:
        if node.over and across != "tensor":
            raise TypeError(
                f"{self.owner}.update: across={across!r} is for values with a number per element; "
                f"this has size 1 in dimension {', '.join(map(str, node.over))}"
            )

    def _total(self, node: Expr) -> Expr:
        # in the order in which the formula asks, which is the order eager sees
        if node.value != "tensor":
            self.totals.append(node)
        return node

    def along(self, op: str, arg: object, dim: int) -> Expr:
        """A reduction over one dimension, which stays with size 1."""
        node, dim = self._lift(arg), self.dim(dim)
        if node.kind is not Kind.ELEMENT:
            raise TypeError(f"{self.owner}.update: {op}() reduces elements; this is one number")
        if dim in node.over:
            return node
        return self.add(f"{op}_dim", (node,), dim, Kind.ELEMENT)

    def extent(self, arg: object, dim: int) -> Expr:
        """The size of a dimension."""
        node, dim = self._lift(arg), self.dim(dim)
        return self.constant(1) if dim in node.over else self.leaf("extent", dim, Kind.SCALAR)

    def dim(self, dim: int) -> int:
        """A dimension, counted from the last; a parameter without dimensions has one of size 1."""
        self.is_shaped = True
        ndim = max(self.ndim, 1)
        if not -ndim <= dim < ndim:
            raise NoDimensionError(
                f"{self.owner} goes along dimension {dim}, which a parameter of {self.ndim} "
                "dimensions does not have"
            )
        return dim - ndim if dim >= 0 else dim

    def _lift(self, value: object) -> Expr:
        if isinstance(value, Expr):
            if value.graph is not self:
                raise TypeError(f"{self.owner}.update: a value of another formula was used")
            return value
        if isinstance(value, (bool, int, float)):
            return self.constant(value)
        raise TypeError(
            f"{self.owner}.update: a formula is made of numbers and the values given to it, "
            f"got {type(value).__name__}"
        )

    def _check_types(self, op: str, nodes: tuple[Expr, ...]) -> None:
        wanted = [op in LOGICAL] * len(nodes)
        if op == "where":
            wanted[0] = True
        for node, boolean in zip(nodes, wanted, strict=True):
            if node.is_boolean != boolean:
                remedy = (
                    f"{op} needs a comparison here, such as x > 0"
                    if boolean
                    else "a comparison is no number; use where(condition, 1.0, 0.0)"
                )
                raise TypeError(f"{self.owner}.update: {remedy}")

    def live(self, wanted: Iterable[Expr]) -> tuple[Expr, ...]:
        """The nodes that these depend on, and these, in order."""
        needed = {node.index for node in wanted}
        for node in reversed(self.nodes):
            if node.index in needed:
                needed.update(arg.index for arg in node.args)
        return tuple(node for node in self.nodes if node.index in needed)

    def add(
        self,
        op: str,
        args: tuple[Expr, ...],
        value: float | str | None,
        kind: Kind,
        over: tuple[int, ...] = (),
    ) -> Expr:
        """This very node, if need be as a new one; `over` is for leaves."""
        # repr tells 0.0 from -0.0 and finds NaN again, which == does not
        key = (op, tuple(arg.index for arg in args), repr(value), kind)
        if key not in self._known:
            if args and kind is Kind.ELEMENT:
                over = _size_one(op, args, value)
            self._known[key] = Expr(self, op, args, value, kind, len(self.nodes), over)
            self.nodes.append(self._known[key])
        return self._known[key]


def _size_one(op: str, args: tuple[Expr, ...], value: float | str | None) -> tuple[int, ...]:
    """The dimensions of size 1 of what an operation on elements gives."""
    if op in ALONG:
        return tuple(sorted({*args[0].over, int(value or 0)}))
    shared = set.intersection(*(set(a.over) for a in args if a.kind is Kind.ELEMENT))
    return tuple(sorted(shared))
