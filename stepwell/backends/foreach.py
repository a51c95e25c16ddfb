"""One torch._foreach_* call per operation, for any device; in place wherever a value is used up.

A result takes over the memory of an argument that nothing needs any more: a temporary, or the
old value of the entry of the state that the result leads to. What remains is what the formula
forces, at most a few temporaries of the size of the cohort.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from ..cohort import Cohort, Facts, Scaling, facts_hold, has_gaps_or_overlaps
from ..hyperparameters import columns_of
from ..language import Program, functions
from ..language.expr import ALONG, REDUCTIONS, Expr, Graph, Kind
from ..language.number import Number
from ..language.program import rewritten
from ..native.overlap import sharing

NAME = "foreach"

List = list[Tensor]
Numbers = list[float]

# Operations that torch has for lists of tensors, with the name of the function; in place it ends
# in an underscore. The second argument may be a list of numbers.
LISTED = {
    "add": "_foreach_add",
    "sub": "_foreach_sub",
    "mul": "_foreach_mul",
    "div": "_foreach_div",
    "pow": "_foreach_pow",
    "maximum": "_foreach_maximum",
    "minimum": "_foreach_minimum",
    "neg": "_foreach_neg",
    "abs": "_foreach_abs",
    "sqrt": "_foreach_sqrt",
    "exp": "_foreach_exp",
    "log": "_foreach_log",
    "floor": "_foreach_floor",
    "sign": "_foreach_sign",
    "lerp": "_foreach_lerp",
}
# a + s b, a + s b c and a + s b / c in one call, without a temporary for the second term; `s` is
# last among the arguments.
COMBINED = {
    "scaled_add": "_foreach_add",
    "addcmul": "_foreach_addcmul",
    "addcdiv": "_foreach_addcdiv",
}
COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum"})


def _where(condition: Any, a: Any, b: Any) -> Any:
    """A tensor of its own, also where a condition that holds for all elements picks one of two."""
    picked = functions.where(condition, a, b)
    if isinstance(picked, Tensor):
        return picked if isinstance(condition, Tensor) else picked.clone()
    like = next((value for value in (a, b) if isinstance(value, Tensor)), None)
    return picked if like is None else torch.full_like(like, picked)


# What a formula does with numbers, and with tensors where torch has no call for a list of them.
SINGLE: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "neg": operator.neg,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": operator.and_,
    "or": operator.or_,
    "not": lambda x: not x if isinstance(x, bool) else ~x,
    "abs": abs,
    "where": _where,
    "sqrt": functions.sqrt,
    "exp": functions.exp,
    "log": functions.log,
    "floor": functions.floor,
    "sign": functions.sign,
    "atan2": functions.atan2,
    "isfinite": functions.isfinite,
    "maximum": functions.maximum,
    "minimum": functions.minimum,
    "lerp": functions.lerp,
}
LEAVES = frozenset({"param", "grad", "state", "group", "const", "numel", "extent", "epsilon"})
# How a value of each tensor is reduced; over one dimension, if the node names it.
REDUCE: dict[str, Callable[..., Any]] = {"sum": functions.sum, "amax": functions.amax}
SUPPORTED = LEAVES | SINGLE.keys() | REDUCTIONS | ALONG


def refuses(program: Program, facts: Facts) -> str | None:
    """Why this cohort cannot run here, or None."""
    missing = program.ops - SUPPORTED
    if missing:
        return f"no operation {', '.join(sorted(missing))}"
    if program.totals:
        return "a value depends on several parameters"
    if facts.device.type == "meta":
        return "state without numbers"
    if facts.layout not in ("dense", "strided"):
        return f"{facts.layout} memory"
    if dict(facts.static).get("capturable"):
        return "numbers that are to stay on the device"
    if program.feeds_back:
        return "state that is one number depends on a reduction"
    return None


class Launch:
    """A cohort whose tensors are updated as lists."""

    stays_on_device = False

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self._now = cohort
        self._grads: List = []
        self._places: list[int] = []
        self._program = rewritten(cohort.program, _combine)
        self._plan = _Liveness(self._program)
        self._looks_at_sizes = not cohort.program.ops.isdisjoint({"numel", "extent"})
        self._columns = {name: i for i, name in enumerate(columns_of(cohort.program.formula))}

    def load(self, scaling: Scaling) -> bool:
        """Take this step's gradients; False if the cohort's facts are no longer true."""
        self._now, self._grads = self.cohort.present()
        return facts_hold(self._now, self._grads) and self._is_apart()

    def _is_apart(self) -> bool:
        """Return whether the written tensors share no memory; recompute when a tensor has moved."""
        slots = self.cohort.program.element_slots
        states = (state[n] for state in self.cohort.states for n in slots if n in state)
        written = [*self.cohort.params, *states]
        places = [tensor.data_ptr() for tensor in written]
        if places != self._places:
            if sharing(written).any():
                return False
            self._places = places
        return True

    def shares(self, found: Sequence[Mapping[Any, float]]) -> list[tuple[int | None, float]]:
        """No program with totals comes here."""
        return []

    @torch.no_grad()
    def run(self, found: Sequence[Mapping[Any, float]] = ()) -> None:
        """Go through the program once, for all tensors at a time."""
        cohort, program = self._now, self._program
        if not self._grads:
            return
        slots = self._slots()
        numbers = self._numbers()
        values: dict[Expr, List] = {}
        homes: dict[Expr, str | None] = {}
        for node in program.nodes:
            if node.kind is Kind.SCALAR:
                continue
            if node.op in LEAVES:
                values[node], homes[node] = slots[str(node.value)], str(node.value)
                continue
            place = self._plan.place(node, homes)
            values[node] = _apply(node, [_argument(a, values, numbers) for a in node.args], place)
            homes[node] = None if place is None else homes[node.args[place]]
            for spent in self._plan.spent[node]:
                values.pop(spent, None)
        self._store(values, numbers, homes)
        for name in cohort.program.scalar_slots:
            if name in program.outputs:
                new = numbers[program.outputs[name]]
                for state, value in zip(cohort.states, new, strict=True):
                    device = state[name].device
                    state[name].copy_(torch.tensor(value, dtype=torch.float64, device=device))
        # they would outlive zero_grad() here
        self._grads = []

    def _slots(self) -> dict[str, List]:
        cohort, absent = self._now, self._now.facts.absent
        slots = {"param": cohort.params, "grad": self._grads}
        for name in cohort.program.element_slots:
            if name not in absent:
                slots[name] = cohort.state_tensors(name)
        return {name: [self._compute(t.detach()) for t in value] for name, value in slots.items()}

    def _compute(self, tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        double = self.cohort.facts.param_dtype in (torch.float64, torch.complex128)
        return tensor.to(torch.float64 if double else torch.float32)

    def _numbers(self) -> dict[Expr, Numbers]:
        """The value of each node that is one number per parameter, by row."""
        cohort = self._now
        state: dict[str, Numbers] = {
            n: [Number(t) for t in cohort.state_tensors(n)] for n in cohort.program.scalar_slots
        }
        values: dict[Expr, Numbers] = {}
        known: dict[tuple[Any, ...], int] = {}
        order = []
        for row, group in enumerate(cohort.group_indices):
            shape = cohort.params[row].shape if self._looks_at_sizes else None
            key = (group, shape, *(numbers[row] for numbers in state.values()))
            order.append(known.setdefault(key, row))
        rows = sorted(set(order))
        for node in self._program.nodes:
            if node.kind is not Kind.SCALAR:
                continue
            some = {row: self._number(node, row, values, state) for row in rows}
            values[node] = [some[row] for row in order]
        return values

    def _number(
        self, node: Expr, row: int, values: dict[Expr, Numbers], state: dict[str, Numbers]
    ) -> Any:
        if node.op == "const":
            return Number(node.value or 0)
        if node.op == "state":
            return state[str(node.value)][row]
        if node.op == "group":
            table = self._now.hyperparameters.table
            return Number(table[self._now.group_indices[row], self._columns[str(node.value)]])
        if node.op == "epsilon":
            return Number(torch.finfo(self.cohort.facts.param_dtype).eps)
        if node.op == "numel":
            return Number(self._compute(self._now.params[row].detach()).numel())
        if node.op == "extent":
            return Number(functions.numel(self._now.params[row], dim=int(node.value or 0)))
        return SINGLE[node.op](*(values[arg][row] for arg in node.args))

    def _store(
        self,
        values: dict[Expr, List],
        numbers: dict[Expr, Numbers],
        homes: dict[Expr, str | None],
    ) -> None:
        cohort = self._now
        outputs = {
            name: node
            for name, node in self._program.outputs.items()
            if name not in cohort.program.scalar_slots
        }
        new: dict[str, Any] = {}
        for name, node in outputs.items():
            value = _argument(node, values, numbers)
            # another slot's memory, which is about to be overwritten
            foreign = node in homes and homes[node] not in (None, name)
            new[name] = [tensor.clone() for tensor in value] if foreign else value
        for name, value in new.items():
            if name in cohort.facts.absent:
                self._create(name, value)
                continue
            if name == "grad" and any(map(_is_no_plain_memory, self._grads)):
                # elements that share memory cannot be written one by one
                for param, grad in zip(cohort.params, value, strict=True):
                    param.grad = _restored(grad, param.grad)
                continue
            targets = self._targets(name)
            if isinstance(value[0], float):
                for target, number in zip(targets, value, strict=True):
                    target.fill_(number)
            elif homes[outputs[name]] != name or value[0].dtype != targets[0].dtype:
                torch._foreach_copy_(targets, value)

    def _targets(self, name: str) -> List:
        tensors = {"param": self._now.params, "grad": self._grads}.get(name)
        tensors = self._now.state_tensors(name) if tensors is None else tensors
        return [torch.view_as_real(t.detach()) if t.is_complex() else t.detach() for t in tensors]

    def _create(self, name: str, value: list[Any]) -> None:
        for param, state, new in zip(self._now.params, self._now.states, value, strict=True):
            state[name] = torch.empty_like(param).detach()
            target = state[name]
            (torch.view_as_real(target) if target.is_complex() else target).copy_(new)


def _is_no_plain_memory(grad: Tensor) -> bool:
    return has_gaps_or_overlaps(grad) or grad.is_conj() or grad.is_neg()


def _restored(value: Tensor, like: Tensor | None) -> Tensor:
    """A value of the formula in the dtype of a tensor that it takes the place of."""
    assert like is not None
    value = torch.view_as_complex(value.contiguous()) if like.is_complex() else value
    return value.to(like.dtype).clone()


class _Liveness:
    """When each value of a program is used for the last time, and where a result may go."""

    def __init__(self, program: Program) -> None:
        last: dict[Expr, Expr] = {}
        for node in program.nodes:
            last.update(dict.fromkeys(node.args, node))
        kept = set(program.outputs.values())
        # sets: `in` asks a list with ==, which for a node is a node
        self.spent: dict[Expr, set[Expr]] = {node: set() for node in program.nodes}
        for value, node in last.items():
            if value not in kept:
                self.spent[node].add(value)
        self._leads_to = {name: _ancestors(node) for name, node in program.outputs.items()}

    def place(self, node: Expr, homes: dict[Expr, str | None]) -> int | None:
        """The argument whose memory the result may have, or None."""
        candidates = range(2) if node.op in COMMUTATIVE and len(node.args) == 2 else range(1)
        for index in candidates:
            arg = node.args[index]
            if arg.kind is not Kind.ELEMENT or arg not in self.spent[node]:
                continue
            # what is one number per row has no room for one per element
            if arg.over != node.over or (node.op not in LISTED and node.op not in COMBINED):
                continue
            home = homes[arg]
            if home is None or (home != "grad" and node in self._leads_to.get(home, ())):
                return index
        return None


def _ancestors(node: Expr) -> set[Expr]:
    found: set[Expr] = set()
    stack = [node]
    while stack:
        found.add(current := stack.pop())
        stack += [arg for arg in current.args if arg not in found]
    return found


def _argument(node: Expr, values: dict[Expr, List], numbers: dict[Expr, Numbers]) -> Any:
    return numbers[node] if node.kind is Kind.SCALAR else values[node]


def _combine(graph: Graph, node: Expr, args: tuple[Expr, ...], single: list[bool]) -> Expr:
    """One call for a sum whose second term is a product or a quotient that nothing else needs."""
    same = graph.add(node.op, args, node.value, node.kind, node.over)
    if node.op not in ("add", "sub") or node.kind is not Kind.ELEMENT:
        return same
    for start, term in ((0, 1), (1, 0)):
        if start and node.op == "sub":
            break
        factors = _factors(args[term]) if single[term] else None
        if factors is not None and args[start].kind is Kind.ELEMENT:
            op, number, elements = factors
            number = graph.constant(1.0) if number is None else number
            number = -number if node.op == "sub" else number
            return graph.apply(op, args[start], *elements, number)
    return same


def _factors(term: Expr) -> tuple[str, Expr | None, tuple[Expr, ...]] | None:
    """s b, (s b) c or (s b) / c: the operation that adds it, s, and the elements."""
    if term.kind is not Kind.ELEMENT or term.op not in ("mul", "div"):
        return None
    left, right = term.args
    if term.op == "mul" and left.kind is Kind.SCALAR:
        return "scaled_add", left, (right,)
    if term.op == "mul" and right.kind is Kind.SCALAR:
        return "scaled_add", right, (left,)
    if left.kind is not Kind.ELEMENT or right.kind is not Kind.ELEMENT:
        return None
    op = "addcmul" if term.op == "mul" else "addcdiv"
    if left.op == "mul" and left.args[0].kind is Kind.SCALAR:
        return op, left.args[0], (left.args[1], right)
    return op, None, (left, right)


def _apply_combined(node: Expr, args: list[Any], place: int | None) -> List:
    start, *elements, number = args
    number = _one_if_same(number)
    name = COMBINED[node.op]
    if node.op == "scaled_add" and isinstance(number, list):
        # torch takes one alpha for the whole list; a product apart would be rounded on its own
        add = torch.add if place is None else Tensor.add_
        terms = zip(start, elements[0], number, strict=True)
        return [add(value, term, alpha=alpha) for value, term, alpha in terms]
    function = getattr(torch, name + ("" if place is None else "_"))
    if node.op == "scaled_add":
        result = function(start, elements[0], alpha=number)
    else:
        result = function(start, *elements, number)
    return start if place is not None else list(result)


def _apply(node: Expr, args: list[Any], place: int | None) -> List:
    """The operation on lists; with a place, in the memory of that argument."""
    if node.op in REDUCTIONS:
        return [REDUCE[node.op](x) for x in args[0]]
    if node.op in ALONG:
        reduce = REDUCE[node.op.removesuffix("_dim")]
        return [reduce(x, dim=int(node.value or 0)) for x in args[0]]
    if node.op in COMBINED:
        return _apply_combined(node, args, place)
    if place == 1 or (node.op in COMMUTATIVE and _is_numbers(args[0])):
        args = args[::-1]
    first, rest = args[0], [_one_if_same(arg) for arg in args[1:]]
    if _is_numbers(first) and node.op == "sub":
        return list(torch._foreach_add(torch._foreach_neg(args[1]), _one_if_same(first)))
    if _is_numbers(first) and node.op == "div":
        return list(torch._foreach_mul(torch._foreach_reciprocal(args[1]), _one_if_same(first)))
    if _is_numbers(first) or (node.op == "lerp" and _is_numbers(args[1])) or node.op not in LISTED:
        return list(starmap(SINGLE[node.op], zip(*args, strict=True)))
    function = getattr(torch, LISTED[node.op] + ("" if place is None else "_"))
    result = function(first, *rest)
    return first if place is not None else list(result)


def _is_numbers(value: Any) -> bool:
    return isinstance(value[0], (float, bool))


def _one_if_same(value: Any) -> Any:
    # the overload for one number launches less than the one for a list of them
    return value[0] if _is_numbers(value) and _are_same(value) else value


def _are_same(numbers: Numbers) -> bool:
    first = numbers[0]
    if first != first:
        return all(map(math.isnan, numbers))
    # zeros of two signs are equal, and what is divided by them is not
    return numbers.count(first) == len(numbers) and (
        first != 0 or len({math.copysign(1, number) for number in numbers}) == 1
    )
