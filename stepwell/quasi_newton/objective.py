"""The loss as a function of one vector, and of one number along a line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..shards import is_sharded, mean_over, part_of, whole
from .vectors import dot, empty_vector, flattened, largest, reals

__all__ = ["Line", "Objective", "Point", "needs_closure"]


class Objective:
    """The loss as a function of all parameters, strung together into one vector of reals.

    Where parameters are distributed, every process has the whole vector, and the loss is the mean
    of what its closures return, so that all processes take the same way.

    Args:
        params: the parameters, each of them once
        closure: computes the loss and the gradients anew, and returns the loss
        grad_scale: what gradients must be divided by, or None
        maximize: whether to take the loss times -1
        place: what messages call a parameter, by its index

    Attributes:
        evaluations: how often the closure has been called and returned
        resting: the indices of frozen parameters, which got no gradient at the latest evaluation
    """

    resting: tuple[int, ...] = ()

    def __init__(
        self,
        params: Sequence[Tensor],
        closure: Callable[[], Any],
        *,
        grad_scale: Any = None,
        maximize: bool = False,
        place: Callable[[int], str] = "parameter {}".format,
    ) -> None:
        self._params = params
        self._closure = closure
        self._sign = -1.0 if maximize else 1.0
        self._factor = self._sign / (1.0 if grad_scale is None else float(grad_scale))
        self._place = place
        self._from = empty_vector(params)
        self._to = torch.empty_like(self._from)
        # a distributed parameter, and all of its numbers
        self._pairs: list[tuple[Any, Tensor]] = [(p, _empty(p)) for p in params if is_sharded(p)]
        wholes = {id(param): numbers for param, numbers in self._pairs}
        self._reals = [reals(wholes.get(id(param), param)) for param in params]
        self._shapes = [param.shape for param in params]
        self._ends = list(accumulate(real.numel() for real in self._reals))
        pieces = zip(self._split(self._to), self._reals, strict=True)
        self._pieces = [piece.view(real.shape) for piece, real in pieces]
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
        for param, numbers in self._pairs:
            numbers.copy_(whole(param))
        torch.cat([real.reshape(-1) for real in self._reals], out=self._from)

    def move(self, direction: Tensor, t: float) -> None:
        """Set the parameters to what they were at the departure, plus `t * direction`."""
        torch.add(self._from, direction, alpha=t, out=self._to)
        torch._foreach_copy_(self._reals, self._pieces)
        for param, numbers in self._pairs:
            param.copy_(part_of(numbers, param))

    def is_finite(self) -> bool:
        """Return whether all parameters are finite where they have been moved to."""
        return all(math.isfinite(largest(real)) for real in self._reals)

    def evaluate(self) -> tuple[Any, float, Tensor]:
        """Return the closure's result, the loss as a number, and the gradient."""
        with torch.enable_grad():
            returned = self._closure()
        return returned, *self.read(returned)

    def read(self, returned: Any) -> tuple[float, Tensor]:
        """Count an evaluation; return its loss, from the closure's result, and the gradient."""
        self.evaluations += 1
        if self._pairs:
            mesh = self._pairs[0][0].device_mesh
            loss = self._sign * mean_over(mesh, _number(whole(returned)))
        else:
            loss = self._sign * _number(returned)
        grad = self._gradient().to(self._to.dtype)
        return loss, grad if self._factor == 1 else grad.mul_(self._factor)

    def _gradient(self) -> Tensor:
        grads: list[Any] = [param.grad for param in self._params]
        absent = [index for index, grad in enumerate(grads) if grad is None]
        self.resting = tuple(i for i in absent if not self._params[i].requires_grad)
        for index in absent:
            grads[index] = torch.zeros_like(self._params[index])
        try:
            wholes = [whole(grad) for grad in grads] if self._pairs else grads
            flat = torch.cat([flattened(grad) for grad in wholes])
        except RuntimeError:
            self._check(grads)
            raise
        if [grad.shape for grad in grads] != self._shapes or flat.shape != self._to.shape:
            self._check(grads)
        return flat

    def _check(self, grads: Sequence[Tensor]) -> None:
        for index, (grad, param) in enumerate(zip(grads, self._params, strict=True)):
            found = grad.shape, grad.device, grad.is_complex()
            if found != (self._shapes[index], param.device, param.is_complex()):
                raise RuntimeError(
                    f"LBFGS: the gradient of {self._place(index)} is {_kind(grad)}, which does not "
                    f"fit its parameter, {_kind(param)}"
                )


def needs_closure(got: Any) -> str:
    """Return the error text for a step without a closure: Python's words, then the remedy."""
    words = "LBFGS.step() missing 1 required positional argument: 'closure'"
    if got is not None:
        words = f"LBFGS.step(): '{type(got).__name__}' object is not callable"
    return (
        f"{words} (LBFGS needs a closure that computes the loss and the gradients anew, and "
        "returns the loss, as\n"
        "    def closure():\n"
        "        optimizer.zero_grad()\n"
        "        loss = loss_fn(model(inputs), targets)\n"
        "        loss.backward()\n"
        "        return loss\n"
        "    optimizer.step(closure))"
    )


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def _empty(like: Tensor) -> Tensor:
    """A plain tensor with as many numbers as all of a distributed one."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _number(returned: Any) -> float:
    """The loss that a closure has returned, as a float."""
    try:
        return float(returned.item() if isinstance(returned, Tensor) else returned)
    except (RuntimeError, TypeError, ValueError):
        return _number_or_refusal(returned)


def _number_or_refusal(returned: Any) -> float:
    try:
        # not item(), for torch calls float(): a complex number without an imaginary part is one
        return float(returned.detach() if isinstance(returned, Tensor) else returned)
    except (RuntimeError, TypeError, ValueError) as error:
        kind = next(k for k in (RuntimeError, TypeError, ValueError) if isinstance(error, k))
        got = type(returned).__name__ if returned is not None else "None"
        if isinstance(returned, Tensor):
            got = f"a Tensor of shape {tuple(returned.shape)} ({returned.dtype})"
        raise kind(
            f"{error} (LBFGS: the closure must return the loss, got {got}; it must be one real "
            "number, as the sum or the mean of several losses is)"
        ) from error


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
