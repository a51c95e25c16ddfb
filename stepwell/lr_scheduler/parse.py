"""A curve from text, such as an argument on the command line; nothing in the text is executed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from typing import Any

from ..language.fields import near_miss
from . import curves
from .curves import Curve

CONSTRUCTORS: Mapping[str, Any] = {
    name: made for name, made in vars(curves).items() if callable(made) and name.islower()
}
OPERATORS = {ast.RShift: operator.rshift, ast.Mult: operator.mul}
GRAMMAR = "curves such as cosine(1000), `>>` for then, `*`, numbers and parentheses"


def parse(text: str) -> Curve:
    """The curve that a text such as "warmup(500) >> cosine(9_500) * 0.5" describes.

    The text may hold the curves of this package with numbers, lists of numbers and words as
    arguments, `>>`, `*` and parentheses.

    Raises:
        ValueError: it holds something else, or an argument is out of range
        TypeError: an argument is missing, too many, or of the wrong kind

    >>> parse("2 * (warmup(500) >> cosine(9_500, end=0.1))")
    (warmup(500) >> cosine(9500, end=0.1)) * 2
    """
    try:
        curve = _value(ast.parse(text.strip(), mode="eval").body, text)
    except (SyntaxError, RecursionError, MemoryError) as error:
        problem = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ValueError(f"{text!r} is no curve: {problem} (it may hold {GRAMMAR})") from None
    if not isinstance(curve, Curve):
        raise ValueError(f"{text!r} is no curve (it may hold {GRAMMAR})")
    return curve


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left, text), _value(node.right, text)
        if isinstance(left, Curve) or isinstance(right, Curve):
            return OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _call(node.func.id, node, text)
    return _argument(node, text)


def _call(name: str, node: ast.Call, text: str) -> Any:
    if name not in CONSTRUCTORS:
        close = near_miss(name, CONSTRUCTORS)
        hint = f"did you mean {close!r}?" if close else f"there are {', '.join(CONSTRUCTORS)}"
        raise ValueError(f"{text!r}: there is no curve {name!r}; {hint}")
    names = [keyword.arg for keyword in node.keywords]
    if None in names or len(set(names)) < len(names):
        raise _refusal(node, text)
    arguments = [_value(argument, text) for argument in node.args]
    named = {str(keyword.arg): _value(keyword.value, text) for keyword in node.keywords}
    return CONSTRUCTORS[name](*arguments, **named)


def _argument(node: ast.expr, text: str) -> Any:
    """A number, a word or None; a list of these; a negative number, which curves refuse better."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, type(None))):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_argument(item, text) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _argument(node.operand, text)
        if isinstance(value, (int, float)):
            return -value
    raise _refusal(node, text)


def _refusal(node: ast.expr, text: str) -> ValueError:
    return ValueError(f"{text!r}: {ast.unparse(node)!r} is not allowed here (only {GRAMMAR})")
