"""Formula -> the equations of docstrings and web pages."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .expr import ALONG, Expr
from .program import Formula, Program, trace

__all__ = ["equations"]

# The field's letters; what is not listed goes by its own name.
SYMBOLS = {
    "param": "p",
    "grad": "g",
    "step": "t",
    "betas.0": "b1",
    "betas.1": "b2",
    "weight_decay": "wd",
    "momentum": "mu",
    "dampening": "tau",
    "exp_avg": "m",
    "exp_avg_sq": "v",
    "max_exp_avg_sq": "v_max",
    "exp_inf": "u",
    "square_avg": "v",
    "acc_delta": "u",
    "momentum_buffer": "b",
}

# How tightly an operator binds.
SUM, PRODUCT, POWER, ATOM = range(4)
INFIX = {"add": ("+", SUM), "sub": ("-", SUM), "div": ("/", PRODUCT)}
SHORT = {"maximum": "max", "minimum": "min"}
# What a line of a docstring has room for.
WIDTH = 88
COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "=", "ne": "!="}


def equations(formula: Formula, group: Mapping[str, Any], ndim: int = 2) -> list[str]:
    """One line per value that is kept, or named and used twice, the new parameter last.

    They are those of parameters with `ndim` dimensions, if that makes a difference.

    `m <- b1 m + (1 - b1) g`: on the right of an arrow, a name means the latest value of it. Names
    are those of the formula's own variables.
    """
    with _variables() as named:
        program = trace(formula, group, ndim=ndim)
    return _Printer(program, named).lines()


@contextmanager
def _variables() -> Iterator[dict[Expr, str]]:
    """What the functions of a formula call their values while they run."""
    named: dict[Expr, str] = {}

    def note(frame: Any, event: str, _: object) -> None:
        if event == "return" and not frame.f_globals["__name__"].startswith("stepwell.language"):
            for name, value in frame.f_locals.items():
                if isinstance(value, Expr):
                    named.setdefault(value, SYMBOLS.get(name, name))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield named
    finally:
        sys.setprofile(before)


class _Printer:
    def __init__(self, program: Program, named: Mapping[Expr, str]) -> None:
        self.program = program
        self.named = named
        self.uses = Counter(arg for node in program.nodes for arg in node.args)
        self.kept = {node: name for name, node in program.outputs.items() if name != "param"}
        self.apart: set[Expr] = set()
        self.names: dict[Expr, str] = {}

    def lines(self) -> list[str]:
        """All equations, in the order of the formula; none longer than a docstring has room for."""
        while True:
            self.names = {}
            lines = self._all()
            inside = [n for n in self.program.nodes if n.args and n in self.named]
            hidden = [n for n in inside if n not in self.names and n not in self.apart]
            hidden = [n for n in hidden if n is not self.program.outputs["param"]]
            if max(map(len, lines)) <= WIDTH or not hidden:
                return lines
            self.apart.add(max(hidden, key=lambda node: len(self._text(node)[0])))

    def _all(self) -> list[str]:
        lines = []
        for node in self.program.nodes:
            name = self._name(node)
            if name is None:
                continue
            if name != "t":
                lines.append(f"{name} <- {self._text(node)[0]}")
            self.names[node] = name
        last = f"p <- {self._text(self.program.outputs['param'])[0]}"
        return lines if last == "p <- p" and lines else [*lines, last]

    def _name(self, node: Expr) -> str | None:
        if node in self.kept:
            return SYMBOLS.get(self.kept[node], self.kept[node])
        is_worth_it = self.uses[node] > 1 or node in self.apart
        return self.named.get(node) if node.args and is_worth_it else None

    def _text(self, node: Expr) -> tuple[str, int]:
        """The node in words, and how tightly its outermost operator binds."""
        if node in self.names:
            return self.names[node], ATOM
        if node.op == "const":
            return f"{node.value:g}", ATOM
        if not node.args:
            return SYMBOLS.get(str(node.value), str(node.value)), ATOM
        mean = _averaged(node)
        if mean is not None:
            dim = f", dim={mean.value}" if mean.op in ALONG else ""
            return f"mean({self._text(mean.args[0])[0]}{dim})", ATOM
        if node.op in INFIX:
            sign, level = INFIX[node.op]
            left = self._within(node.args[0], level)
            return f"{left} {sign} {self._within(node.args[1], level + (sign != '+'))}", level
        if node.op == "mul":
            return self._product(node)
        if node.op == "pow":
            return f"{self._within(node.args[0], ATOM)}^{self._within(node.args[1], ATOM)}", POWER
        if node.op == "neg":
            return f"-{self._within(node.args[0], PRODUCT)}", SUM
        if node.op == "lerp":
            return self._mean(node)
        arguments = [self._text(arg)[0] for arg in node.args]
        if node.op in ALONG:
            return f"{node.op.removesuffix('_dim')}({arguments[0]}, dim={node.value})", ATOM
        if node.op in COMPARE:
            return f" {COMPARE[node.op]} ".join(arguments), SUM
        if node.op == "abs":
            return f"|{arguments[0]}|", ATOM
        return f"{SHORT.get(node.op, node.op)}({', '.join(arguments)})", ATOM

    def _within(self, node: Expr, level: int) -> str:
        text, binds = self._text(node)
        return text if binds >= level else f"({text})"

    def _product(self, node: Expr) -> tuple[str, int]:
        left, right = node.args
        if left is right:
            return f"{self._within(left, ATOM)}^2", POWER
        if left.op == "mul" and left.args[1] is right and left not in self.names:
            return f"{self._within(left.args[0], PRODUCT)} {self._within(right, ATOM)}^2", PRODUCT
        return f"{self._within(left, PRODUCT)} {self._within(right, POWER)}", PRODUCT

    def _mean(self, node: Expr) -> tuple[str, int]:
        """start + (1 - b) (end - start), as the field writes a running mean."""
        start, end, weight = node.args
        if weight.op == "sub" and weight.args[0].value == 1.0:
            keep = self._within(weight.args[1], PRODUCT)
            old, new = self._within(start, POWER), self._within(end, POWER)
            return f"{keep} {old} + ({self._text(weight)[0]}) {new}", SUM
        return f"lerp({', '.join(self._text(arg)[0] for arg in node.args)})", ATOM


def _averaged(node: Expr) -> Expr | None:
    """The sum that a node divides by the number of its terms."""
    if node.op != "div" or node.args[0].op not in ("sum", "sum_dim"):
        return None
    total, count = node.args
    alike = (count.op, count.value) in (("numel", total.value), ("extent", total.value))
    return total if alike else None
