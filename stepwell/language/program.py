"""trace: run a formula once on symbols, and Program: what it did, in a form back-ends can lower."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .expr import ALONG, REDUCTIONS, Expr, Graph, Kind
from .fields import Field, Slot, near_miss

__all__ = ["Formula", "Program", "Update", "program_for", "trace"]

Update = Callable[[Any, Any, Any, Any], Any]
"""(param, grad, state, group) -> new param; new state is assigned to attributes of `state`."""

STEP = Slot(0.0, scalar=True)

# what depends on how many elements there are, and on those of other rows
WHOLE = REDUCTIONS | ALONG | {"numel", "extent"}

# `state.grad = ...` rewrites the gradient itself; it is no entry of the state
REWRITABLE = {"grad": Slot(None)}


@dataclass(frozen=True, eq=False)
class Formula:
    """A rule as the language sees it: its name, what it declares, and its update."""

    name: str
    fields: Mapping[str, Field]
    slots: Mapping[str, Slot]
    update: Update
    programs: dict[object, Program] = field(default_factory=dict, repr=False)
    """What was traced so far; it lives as long as the formula."""

    def static(self, group: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        """The facts of a group that the formula may branch on; equal facts share a Program."""
        fields = self.fields.items()
        return tuple((name, field.static(group.get(name, field.default))) for name, field in fields)

    def slots_in(self, group: Mapping[str, Any]) -> dict[str, Slot]:
        """The declared state that exists under these hyperparameters."""
        return {n: s for n, s in self.slots.items() if s.when is None or group[s.when]}


@dataclass(frozen=True, eq=False)
class Program:
    """A traced formula: nodes in an order in which each comes after its arguments.

    `outputs` maps "param", and each entry of the state that the formula assigns (with "grad" if
    the gradient itself is rewritten), to the node that is its new value.
    """

    formula: Formula
    nodes: tuple[Expr, ...]
    outputs: Mapping[str, Expr]
    slots: Mapping[str, Slot]
    totals: tuple[Expr, ...] = ()
    """Values that depend on several parameters, in the order in which the formula asks."""
    ndim: int | None = None
    """For parameters of how many dimensions it is, if that makes a difference."""

    @property
    def name(self) -> str:
        """The rule's name."""
        return self.formula.name

    @cached_property
    def element_slots(self) -> tuple[str, ...]:
        """The state entries that have one number per element, in declared order."""
        return tuple(name for name, slot in self.slots.items() if not slot.scalar)

    @cached_property
    def scalar_slots(self) -> tuple[str, ...]:
        """The state entries that are one number per parameter, in declared order."""
        return tuple(name for name, slot in self.slots.items() if slot.scalar)

    @cached_property
    def is_sliced(self) -> bool:
        """Whether some value is one number per row, column or other slice of the parameter."""
        return any(node.over for node in self.nodes)

    @cached_property
    def numbers(self) -> tuple[str, ...]:
        """The hyperparameters that the program reads, `betas.0` for the first of `betas`."""
        found = {str(node.value): None for node in self.nodes if node.op == "group"}
        return tuple(found)

    @cached_property
    def ops(self) -> frozenset[str]:
        """The operations that a back-end needs in order to run this program."""
        return frozenset(node.op for node in self.nodes)

    @cached_property
    def passes(self) -> tuple[int, ...]:
        """For each node, how many sweeps over the elements come before it can be known."""
        level: dict[int, int] = {}
        for node in self.nodes:
            below = max((level[arg.index] for arg in node.args), default=0)
            # what depends on other parameters is known once all have been gone over
            is_total = not node.args and node.kind is Kind.REDUCED
            level[node.index] = below + (node.op in REDUCTIONS | ALONG or is_total)
        return tuple(level[node.index] for node in self.nodes)

    @cached_property
    def feeds_back(self) -> bool:
        """Whether state that is one number per parameter depends on the parameter's elements."""
        return any(
            self.slots[name].scalar and node.kind is Kind.REDUCED
            for name, node in self.outputs.items()
            if name in self.slots
        )

    @cached_property
    def is_idle(self) -> bool:
        """Whether nothing changes where the gradient is zero, so that absent rows need no visit.

        The numbers of a parameter, such as its count of steps, belong to no row.
        """
        if self.is_sliced:
            return False
        zero: set[int] = set()
        same: dict[int, int] = {}
        for node in self.nodes:
            args = [same.get(arg.index, arg.index) for arg in node.args]
            zeros = [arg in zero for arg in args]
            if node.op in WHOLE and not (node.op == "sum" and zeros[0]):
                return False
            if _stays_zero(node, zeros):
                zero.add(node.index)
            elif node.op in ("add", "sub") and zeros[1]:
                same[node.index] = args[0]
            elif node.op == "add" and zeros[0]:
                same[node.index] = args[1]
        inputs = {node.value or node.op: node.index for node in self.nodes if not node.args}
        return all(
            same.get(node.index, node.index) == inputs.get(name)
            for name, node in self.outputs.items()
            if name not in {"grad", *self.scalar_slots}
        )


def _stays_zero(node: Expr, zeros: list[bool]) -> bool:
    if node.op == "grad" or (node.op == "const" and node.value == 0):
        return True
    if node.op == "mul":
        return any(zeros)
    if node.op == "div":
        return zeros[0]
    return node.op in ("neg", "abs", "sqrt", "sign", "add", "sub") and all(zeros)


def trace(
    formula: Formula,
    group: Mapping[str, Any],
    absent: frozenset[str] = frozenset(),
    ndim: int = 2,
) -> Program:
    """Run the formula once on symbols.

    Args:
        formula: the rule
        group: its hyperparameters; of these only the static facts matter
        absent: the entries of the state, of those that start unset, that have no value yet
        ndim: how many dimensions the parameters have

    Raises:
        TypeError: the formula branches on a traced value, or uses what is no number
        AttributeError: it names a hyperparameter or an entry of the state that is not declared
        RuntimeError: it goes along a dimension that the parameters do not have
    """
    graph = Graph(formula.name, ndim)
    symbols = GroupSymbols(graph, formula, group)
    state = StateSymbols(graph, formula, group, absent)
    param = graph.leaf("param", "param", Kind.ELEMENT)
    grad = graph.leaf("grad", "grad", Kind.ELEMENT)
    new_param = formula.update(param, grad, state, symbols)
    outputs = {"param": _result(graph, new_param), **state.assigned()}
    nodes = graph.live([*outputs.values(), *graph.totals])
    shaped = ndim if graph.is_shaped else None
    return Program(formula, nodes, outputs, state.existing(), tuple(graph.totals), shaped)


def program_for(
    formula: Formula,
    group: Mapping[str, Any],
    absent: frozenset[str] = frozenset(),
    ndim: int = 2,
) -> Program:
    """`trace`, once for equal static facts; what the group lacks has its default."""
    facts = {name: f.default for name, f in formula.fields.items()} | dict(group)
    static = formula.static(facts)
    for shaped in (None, ndim):
        if (static, absent, shaped) in formula.programs:
            return formula.programs[static, absent, shaped]
    program = trace(formula, facts, absent, ndim)
    known = formula.programs.values()
    program = next((other for other in known if _is_same(other, program)), program)
    formula.programs[static, absent, None if program.ndim is None else ndim] = program
    return program


def _is_same(a: Program, b: Program) -> bool:
    """Whether parameters of different numbers of dimensions share a program, and so a launch."""
    if a.ndim is None or b.ndim is None or a.slots != b.slots:
        return False
    if any(slot.over is not None and slot.over >= 0 for slot in a.slots.values()):
        return False
    texts = [[(repr(node), node.over) for node in program.nodes] for program in (a, b)]
    ends = [[(n, node.index) for n, node in p.outputs.items()] for p in (a, b)]
    return texts[0] == texts[1] and ends[0] == ends[1]


def _result(graph: Graph, value: object) -> Expr:
    if value is None:
        raise TypeError(f"{graph.owner}.update must return the new parameter, got None")
    lifted = graph.constant(value) if isinstance(value, (int, float)) else value
    if not isinstance(lifted, Expr) or lifted.is_boolean:
        raise TypeError(f"{graph.owner}.update must return the new parameter, got {value!r}")
    return lifted


Rewrite = Callable[[Graph, Expr, tuple[Expr, ...], list[bool]], Expr]
"""(graph, old node, its new arguments, whether it is their only use) -> new node"""


def rewritten(program: Program, rule: Rewrite) -> Program:
    """The program with each node replaced by what the rule makes of it, in a graph of its own."""
    graph = Graph(program.name, program.ndim or 0)
    uses = Counter(arg.index for node in program.nodes for arg in node.args)
    uses.update(node.index for node in program.outputs.values())
    new: dict[int, Expr] = {}
    for node in program.nodes:
        args = tuple(new[arg.index] for arg in node.args)
        new[node.index] = rule(graph, node, args, [uses[arg.index] == 1 for arg in node.args])
    outputs = {name: new[node.index] for name, node in program.outputs.items()}
    totals = tuple(new[node.index] for node in program.totals)
    nodes = graph.live([*outputs.values(), *totals])
    return replace(program, nodes=nodes, outputs=outputs, totals=totals)


class GroupSymbols:
    """The hyperparameters of a group while a formula is traced."""

    def __init__(self, graph: Graph, formula: Formula, group: Mapping[str, Any]) -> None:
        self._graph = graph
        self._formula = formula
        self._group = group

    def __getattr__(self, name: str) -> Any:
        field = self._formula.fields.get(name)
        if field is None:
            known = [name for name in self._formula.fields if name != "grad_scale"]
            raise AttributeError(_undeclared(self._formula, name, known, "group"))
        if field.items:
            pairs = enumerate(zip(field.items, self._group[name], strict=True))
            return tuple(self._symbol(item, v, f"{name}.{i}") for i, (item, v) in pairs)
        return self._symbol(field, self._group[name], name)

    def _symbol(self, field: Field, value: Any, name: str) -> Any:
        static = field.static(value)
        if static is not ...:
            return static
        node = self._graph.leaf("group", name, Kind.SCALAR)
        if field.zero_is_off:
            self._graph.nonzero.add(node.index)
        return node


class StateSymbols:
    """The state of a parameter while a formula is traced."""

    def __init__(
        self, graph: Graph, formula: Formula, group: Mapping[str, Any], absent: frozenset[str]
    ) -> None:
        slots = {"step": STEP, **formula.slots_in(group), **REWRITABLE}
        for name, value in {
            "_graph": graph,
            "_formula": formula,
            "_slots": slots,
            "_absent": absent,
            "_now": {},
            "_used": set(),
        }.items():
            object.__setattr__(self, name, value)

    _graph: Graph
    _formula: Formula
    _slots: dict[str, Slot]
    _absent: frozenset[str]
    _now: dict[str, Expr | None]
    _used: set[str]

    def __getattr__(self, name: str) -> Expr | None:
        self._check(name)
        if name not in self._now:
            self._now[name] = self._first(name)
        return self._now[name]

    def __setattr__(self, name: str, value: object) -> None:
        self._check(name)
        node = _result(self._graph, value)
        over = self._over(name)
        if node.kind is Kind.ELEMENT and not set(over) <= set(node.over):
            raise TypeError(
                f"{self._formula.name}.update: state.{name} has size 1 in dimension {over[0]}, the "
                "value assigned to it has not; reduce it, as in mean(x, dim=...)"
            )
        self._now[name] = node

    def _first(self, name: str) -> Expr | None:
        if name in self._absent:
            return None
        kind = Kind.SCALAR if self._slots[name].scalar else Kind.ELEMENT
        node = self._graph.leaf("state", name, kind, self._over(name))
        return node + 1 if name == "step" else node

    def _over(self, name: str) -> tuple[int, ...]:
        over = self._slots[name].over
        return () if over is None else (self._graph.dim(over),)

    def _check(self, name: str) -> None:
        if name not in self._slots:
            known = [name for name in self._slots if name not in REWRITABLE]
            raise AttributeError(_undeclared(self._formula, name, known, "state"))
        self._used.add(name)

    def assigned(self) -> dict[str, Expr]:
        """The new values, by name, in declared order."""
        changed = ((name, self._now.get(name)) for name in self._slots)
        return {
            name: node
            for name, node in changed
            if node is not None and not (node.op == "state" and node.value == name)
        }

    def existing(self) -> dict[str, Slot]:
        """What a parameter's state holds: what the formula reads or assigns."""
        used = self._used - REWRITABLE.keys()
        return {name: slot for name, slot in self._slots.items() if name in used}


def _undeclared(formula: Formula, name: str, known: Sequence[str], what: str) -> str:
    close = near_miss(name, known)
    hint = f"did you mean {what}.{close}?" if close else f"declared are: {', '.join(known)}"
    return f"{formula.name}.update uses {what}.{name}, which is not declared here; {hint}"
