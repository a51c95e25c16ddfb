"""What a formula may call beside Python's own arithmetic.

Each function takes numbers, tensors or symbols of a traced formula, in any mixture, and answers
in kind. Reductions are computed in float64, whatever the precision of their argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .expr import Expr, Graph, Kind
from .number import Followed, Number, exponential, is_fake

__all__ = [
    "amax",
    "atan2",
    "clamp",
    "epsilon",
    "exp",
    "floor",
    "isfinite",
    "lerp",
    "log",
    "maximum",
    "mean",
    "minimum",
    "norm",
    "rsqrt",
    "sign",
    "sqrt",
    "square",
    "sum",
    "where",
]

ACROSS = ("tensor", "group", "all")


def _graph(*args: object) -> Graph | None:
    return next((arg.graph for arg in args if isinstance(arg, Expr)), None)


def _dispatch(
    op: str, on_tensors: Callable[..., Any], on_floats: Callable[..., Any], *args: Any
) -> Any:
    graph = _graph(*args)
    if graph is not None:
        return graph.apply(op, *args)
    if any(isinstance(arg, Tensor) for arg in args):
        return on_tensors(*args)
    found = on_floats(*args)
    return found if isinstance(found, bool) else Number(found)


def sqrt(x: Any) -> Any:
    """The square root; NaN below zero."""
    return _dispatch("sqrt", torch.sqrt, lambda x: math.sqrt(x) if x >= 0 else math.nan, x)


def rsqrt(x: Any) -> Any:
    """1 / sqrt(x)."""
    return 1 / sqrt(x)


def square(x: Any) -> Any:
    """x * x."""
    return x * x


def exp(x: Any) -> Any:
    """e to the power x."""
    return _dispatch("exp", torch.exp, exponential, x)


def log(x: Any) -> Any:
    """The natural logarithm; -inf at zero, NaN below."""

    def on_floats(x: float) -> float:
        return math.log(x) if x > 0 else (-math.inf if x == 0 else math.nan)

    return _dispatch("log", torch.log, on_floats, x)


def floor(x: Any) -> Any:
    """The largest whole number that is at most x; infinity and NaN stay as they are."""
    return _dispatch("floor", torch.floor, lambda x: x // 1 if math.isfinite(x) else x, x)


def sign(x: Any) -> Any:
    """-1, 0 or 1; 0 for NaN, as torch.sign."""
    return _dispatch("sign", torch.sign, lambda x: float((x > 0) - (x < 0)), x)


def atan2(y: Any, x: Any) -> Any:
    """The angle of the point (x, y), in radians."""
    return _dispatch("atan2", _on_tensors(torch.atan2), math.atan2, y, x)


def isfinite(x: Any) -> Any:
    """Whether x is neither NaN nor infinite; for `where`."""
    return _dispatch("isfinite", torch.isfinite, math.isfinite, x)


def maximum(a: Any, b: Any) -> Any:
    """The larger of the two; NaN where either is NaN."""

    def on_floats(a: float, b: float) -> float:
        return math.nan if a != a or b != b else max(a, b)

    return _dispatch("maximum", _on_tensors(torch.maximum), on_floats, a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of the two; NaN where either is NaN."""

    def on_floats(a: float, b: float) -> float:
        return math.nan if a != a or b != b else min(a, b)

    return _dispatch("minimum", _on_tensors(torch.minimum), on_floats, a, b)


def clamp(x: Any, low: Any, high: Any) -> Any:
    """x held between low and high; NaN stays NaN."""
    return minimum(maximum(x, low), high)


def lerp(start: Any, end: Any, weight: Any) -> Any:
    """start + weight * (end - start): a running mean that takes in a share of something new."""
    graph = _graph(start, end, weight)
    if graph is not None:
        return graph.apply("lerp", start, end, weight)
    if isinstance(start, Tensor) and isinstance(end, Tensor) and start.dtype == end.dtype:
        return torch.lerp(start, end, weight)
    return start + weight * (end - start)


def where(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, b elsewhere; the other value is not looked at."""
    if isinstance(condition, int):
        # ~True is -2 to Python: the truth is in the lowest bit
        return a if condition & 1 else b
    graph = _graph(condition, a, b)
    if graph is not None:
        return graph.apply("where", condition, a, b)
    if torch.is_grad_enabled() and type(condition) is Tensor and not condition.dim():
        # torch.where differentiates both: a root below zero would make the gradient NaN
        return a if condition else b
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.where(condition, a, b)
    # two plain numbers: keep them in float64, or a float64 parameter would see them rounded
    number = {"dtype": torch.float64, "device": condition.device}
    return torch.where(condition, torch.tensor(a, **number), torch.tensor(b, **number))


def sum(x: Any, *, dim: int | None = None, across: str = "tensor") -> Any:
    """The sum of the elements of x.

    `dim` sums over one dimension and keeps it with size 1. `across` is "tensor" (the elements of
    this parameter), "group" (of all parameters of its group) or "all" (of the whole optimizer).
    """
    return _reduce("sum", torch.sum, x, dim, across)


def amax(x: Any, *, dim: int | None = None) -> Any:
    """The largest element of x (of each slice along `dim`, which is kept with size 1)."""
    return _reduce("amax", torch.amax, x, dim, "tensor")


def mean(x: Any, *, dim: int | None = None, across: str = "tensor") -> Any:
    """The mean of the elements of x; arguments as for `sum`."""
    return sum(x, dim=dim, across=across) / numel(x, dim=dim, across=across)


def norm(x: Any, *, dim: int | None = None, across: str = "tensor") -> Any:
    """The Euclidean norm of x; arguments as for `sum`."""
    return sqrt(sum(x * x, dim=dim, across=across))


def numel(x: Any, *, dim: int | None = None, across: str = "tensor") -> Any:
    """How many numbers `sum` with the same arguments adds."""
    if isinstance(x, Expr):
        return x.graph.numel(x, across) if dim is None else x.graph.extent(x, dim)
    if dim is not None:
        # so that a mean of nothing is zero, as it is where nothing is gone over
        return max(x.size(dim), 1) if x.dim() else 1
    return _total(float(x.numel()), across)


def epsilon(x: Any) -> Any:
    """The distance from 1 to the next larger number, in the parameter's own precision."""
    if isinstance(x, Expr):
        return x.graph.leaf("epsilon", "epsilon", Kind.SCALAR)
    asked = _current.get()
    return Number(torch.finfo(x.dtype if asked is None else asked.dtype).eps)


def _reduce(op: str, on_tensors: Callable[..., Any], x: Any, dim: int | None, across: str) -> Any:
    if across not in ACROSS:
        raise ValueError(f"{op}: across must be one of {', '.join(ACROSS)}, got {across!r}")
    if isinstance(x, Expr):
        if dim is not None:
            return x.graph.along(op, x, dim)
        return x.graph.reduce(op, x, across)
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}() reduces the elements of a tensor, got {type(x).__name__}")
    if dim is not None:
        return on_tensors(x.to(torch.float64), dim, keepdim=True).to(x.dtype)
    if x.numel() == 0 and op == "amax":
        return x.new_full((), -math.inf, dtype=torch.float64)
    found = on_tensors(x.to(torch.float64))
    # beside a tensor without dimensions it would not be taken for a number
    return _total(found if x.dim() else found.to(x.dtype), across)


def _on_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of two tensors, for a tensor and a number in either order."""

    def lifted(a: Any, b: Any) -> Any:
        like = a if isinstance(a, Tensor) else b
        a, b = (v if isinstance(v, Tensor) else like.new_full((), v) for v in (a, b))
        return function(a, b)

    return lifted


class Asked:
    """What a formula may ask for while it runs on one parameter, beyond what it is given.

    `dtype` is the parameter's. Totals are what the parameters of a group, or of the optimizer, add
    up to: `found` holds those that are known, in the order in which the formula asks for them,
    each by group (None for "all"). The first total that is not known is noted as this parameter's
    `share` of it.
    """

    def __init__(
        self, found: Sequence[Mapping[Any, float]], group: int, dtype: torch.dtype
    ) -> None:
        self.found = found
        self.group = group
        self.dtype = dtype
        self.asked = 0
        self.share: tuple[int | None, float] | None = None

    def answer(self, value: Any, across: str) -> Any:
        """The total, or this parameter's own value where it is not known yet."""
        index, self.asked = self.asked, self.asked + 1
        key = self.group if across == "group" else None
        if index < len(self.found):
            total = self.found[index][key]
            return total.tensor if isinstance(total, Followed) else total
        if index == len(self.found):
            if isinstance(value, Tensor) and is_fake(value):
                value = math.nan
            followed = isinstance(value, Tensor) and value.requires_grad
            self.share = (key, Followed(value) if followed else float(value))
            return value if followed else Number(value)
        return value


_current: ContextVar[Asked | None] = ContextVar("asked", default=None)


@contextmanager
def answering(asked: Asked) -> Iterator[None]:
    """Run one parameter's formula with these answers."""
    token = _current.set(asked)
    try:
        yield
    finally:
        _current.reset(token)


def _total(value: Any, across: str) -> Any:
    if across == "tensor":
        return value
    asked = _current.get()
    if asked is None:
        raise RuntimeError(f"across={across!r} has a meaning only inside an optimizer's step")
    return asked.answer(value, across)
