"""The loss as a function of one vector, and of one number along a line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .vectors import dot, empty_vector, flat_grad, largest, reals

__all__ = ["Line", "Objective", "Point"]


class Objective:
    """The loss as a function of all parameters, strung together into one vector of reals.

    Attributes:
        evaluations: how often the closure has been called and returned
        resting: the indices of frozen parameters, which got no gradient at the latest evaluation
    """

    resting: tuple[int, ...] = ()

    def __init__(self, params: Sequence[Tensor], closure: Callable[[], Any]) -> None:
        self._params = params
        self._reals = [reals(param) for param in params]
        self._closure = closure
        self._from, self._to = empty_vector(params), empty_vector(params)
        self._ends = list(accumulate(real.numel() for real in self._reals))
        pairs = zip(self._split(self._to), self._reals, strict=True)
        self._pieces = [x.view(real.shape) for x, real in pairs]
        self.evaluations = 0

    def _split(self, vector: Tensor) -> Sequence[Tensor]:
        """The parts of a vector that belong to each parameter."""
        return torch.tensor_split(vector, self._ends[:-1])

    def leave_resting(self, direction: Tensor) -> None:
        """Let a direction lead nowhere for parameters that rest."""
        if self.resting:
            pieces = self._split(direction)
            torch._foreach_zero_([pieces[index] for index in self.resting])

    def depart(self) -> None:
        """Moves start from where the parameters are now."""
        torch.cat([real.reshape(-1) for real in self._reals], out=self._from)

    def move(self, direction: Tensor, t: float) -> None:
        """Set the parameters to what they were at the departure, plus `t * direction`."""
        torch.add(self._from, direction, alpha=t, out=self._to)
        torch._foreach_copy_(self._reals, self._pieces)

    def is_finite(self) -> bool:
        """Whether all parameters are, where they are now."""
        return all(math.isfinite(largest(real)) for real in self._reals)

    def evaluate(self) -> tuple[Any, float, Tensor]:
        """What the closure returns, that as a number, and the gradient."""
        with torch.enable_grad():
            returned = self._closure()
        self.evaluations += 1
        if returned is None:
            raise TypeError("the closure must return the loss, got None")
        # what float() says of a tensor with a history is a warning
        loss = returned.item() if isinstance(returned, Tensor) else float(returned)
        params = enumerate(self._params)
        self.resting = tuple(i for i, p in params if p.grad is None and not p.requires_grad)
        grad = torch.cat([flat_grad(param) for param in self._params])
        return returned, loss, grad.to(self._to.dtype)


class Point(NamedTuple):
    """What is known of one place on a line, `t` times its direction away from its start."""

    t: float
    loss: float
    slope: float
    grad: Tensor

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are: one bad element of the gradient spoils the slope."""
        return math.isfinite(self.loss) and math.isfinite(self.slope)


class Line:
    """The loss along one direction, from where the parameters are.

    Attributes:
        start: what is known there
        best: the lowest finite point so far
        shortest: the least difference of two `t` that moves a parameter by the tolerance
        is_broken: whether no point but the start was finite
    """

    def __init__(
        self, objective: Objective, direction: Tensor, start: Point, tolerance: float
    ) -> None:
        self.objective = objective
        self._direction = direction
        self._t = 0.0
        self.start = self.best = start
        self.shortest = tolerance / largest(direction)
        self.is_broken = True
        objective.depart()

    def move(self, t: float) -> None:
        """Set the parameters to what they are at `t`."""
        if t != self._t:
            self.objective.move(self._direction, t)
            self._t = t

    def evaluate(self, t: float) -> Point:
        """What is found at `t`; the parameters are there afterwards."""
        self.move(t)
        _, loss, grad = self.objective.evaluate()
        point = Point(t, loss, dot(grad, self._direction), grad)
        if point.is_finite:
            self.is_broken = False
            self.best = min(self.best, point, key=lambda known: known.loss)
        return point
