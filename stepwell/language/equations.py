"""Program -> the equations of docstrings and web pages."""

from __future__ import annotations

from collections import Counter

from .expr import Expr, Kind
from .program import Program

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
    "momentum_buffer": "b",
}

# How tightly an operator binds.
SUM, PRODUCT, POWER, ATOM = range(4)
INFIX = {"add": ("+", SUM), "sub": ("-", SUM), "div": ("/", PRODUCT)}
COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "=", "ne": "!="}


def equations(program: Program) -> list[str]:
    """One line per value that is kept or used twice, the new parameter last.

    `m <- b1 m + (1 - b1) g`: on the right of an arrow, a name means the latest value of it.
    """
    return _Printer(program).lines()


class _Printer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.uses = Counter(arg for node in program.nodes for arg in node.args)
        self.kept = {node: name for name, node in program.outputs.items() if name != "param"}
        self.names: dict[Expr, str] = {}

    def lines(self) -> list[str]:
        """All equations, in the order of the formula."""
        lines = []
        for node in self.program.nodes:
            name = self._name(node)
            if name is None:
                continue
            if name != "t":
                lines.append(f"{name} <- {self._text(node)[0]}")
            self.names[node] = name
        lines.append(f"p <- {self._text(self.program.outputs['param'])[0]}")
        return lines

    def _name(self, node: Expr) -> str | None:
        if node in self.kept:
            return SYMBOLS.get(self.kept[node], self.kept[node])
        if node.kind is Kind.ELEMENT and node.args and self.uses[node] > 1:
            # a gradient that was changed is still called the gradient
            return "g" if any(self._is_gradient(arg) for arg in node.args) else f"x{node.index}"
        return None

    def _is_gradient(self, node: Expr) -> bool:
        return node.op == "grad" or self.names.get(node) == "g"

    def _text(self, node: Expr) -> tuple[str, int]:
        """The node in words, and how tightly its outermost operator binds."""
        if node in self.names:
            return self.names[node], ATOM
        if node.op == "const":
            return f"{node.value:g}", ATOM
        if not node.args:
            return SYMBOLS.get(str(node.value), str(node.value)), ATOM
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
        if node.op in COMPARE:
            return f" {COMPARE[node.op]} ".join(arguments), SUM
        return f"{node.op}({', '.join(arguments)})", ATOM

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
