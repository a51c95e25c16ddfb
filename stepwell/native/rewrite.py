"""Put a Program into a processor's operations: multiply-add, and no needless division."""

from __future__ import annotations

from functools import partial

import torch

from ..language.expr import Expr, Graph, Kind
from ..language.functions import where
from ..language.program import Program, rewritten

__all__ = ["rewrite"]


def rewrite(program: Program, dtype: torch.dtype) -> Program:
    """The same program with `fma(a, b, c)` = a * b + c, and products with inverses.

    Dividing all elements by one number becomes a product with its inverse, computed once in
    float64: in float32 that rounds as often as the division, since the number itself is rounded
    too. Where the parameter's `dtype` is float64 it is not, and divisions stay.
    """
    return rewritten(program, partial(_lowered, dtype))


def _lowered(
    dtype: torch.dtype, graph: Graph, node: Expr, args: tuple[Expr, ...], single: list[bool]
) -> Expr:
    if node.op == "epsilon":
        return graph.constant(torch.finfo(dtype).eps)
    if node.op == "lerp":
        return _lerp(graph, *args, fuse=node.kind is Kind.ELEMENT)
    if node.kind is not Kind.ELEMENT:
        return graph.add(node.op, args, node.value, node.kind)
    is_double = dtype is torch.float64
    if node.op == "div" and args[1].kind is not Kind.ELEMENT and not is_double:
        return args[0] * (1 / args[1])
    if node.op in ("add", "sub"):
        for product, other in ((0, 1), (1, 0)):
            factor = args[product]
            if factor.op == "mul" and factor.kind is Kind.ELEMENT and single[product]:
                return _multiply_add(graph, node.op, factor, args[other], product)
    return graph.add(node.op, args, node.value, node.kind, node.over)


def _lerp(graph: Graph, start: Expr, end: Expr, weight: Expr, *, fuse: bool) -> Expr:
    # from the nearer end, as torch.lerp: a weight of 1 gives `end`, however large `start` is
    is_small = weight < 0.5
    nearer, share = where(is_small, start, end), where(is_small, weight, weight - 1)
    change = end - start
    return graph.apply("fma", share, change, nearer) if fuse else nearer + share * change


def _multiply_add(graph: Graph, op: str, product: Expr, other: Expr, place: int) -> Expr:
    a, b = product.args
    if op == "add":
        return graph.apply("fma", a, b, other)
    return graph.apply("fma", a, b, -other) if place == 0 else graph.apply("fma", -a, b, other)
