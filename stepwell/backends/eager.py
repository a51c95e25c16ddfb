"""The reference: calls the formula itself, one tensor at a time.

Differentiable, for any device, layout and tensor subclass. Arithmetic is in float32 for half
precision and in float64 where the parameter is; complex numbers are pairs of reals; of a sparse
gradient only the rows that are there are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..cohort import Cohort, Facts, Scaling, facts_hold, has_gaps_or_overlaps
from ..hyperparameters import is_elsewhere
from ..language import Program
from ..language.functions import Asked, answering
from ..language.number import Number, is_fake
from ..sparse import as_it_says

NAME = "eager"

Found = Sequence[Mapping[Any, float]]
"""The totals that are known, each by group."""

Rows = tuple[Tensor, ...] | None
"""The indices of the rows that a sparse gradient has, or None for all."""


def refuses(program: Program, facts: Facts) -> str | None:
    """Nothing is refused: this is where all others fall back to."""
    return None


class Launch:
    """One step of a cohort, a parameter after the other."""

    stays_on_device = False

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self._now = cohort
        self.grads: list[Tensor] = []
        self.grad_scale: Any = None

    def load(self, scaling: Scaling) -> bool:
        """Take this step's gradients; False if the cohort's facts are no longer true."""
        self._now, self.grads = self.cohort.present()
        self.grad_scale = scaling.grad_scale
        return facts_hold(self._now, self.grads)

    def shares(self, found: Found) -> list[tuple[int | None, float]]:
        """What each parameter adds to the next total that the formula asks for."""
        all_asked = [self._evaluate(row, found)[0] for row in range(len(self.grads))]
        return [asked.share for asked in all_asked if asked.share is not None]

    def run(self, found: Found = ()) -> None:
        """Evaluate the formula for each parameter, then store."""
        for row in range(len(self.grads)):
            _, view, result = self._evaluate(row, found)
            with torch.set_grad_enabled(self.cohort.facts.differentiable):
                view.store(*result)
        # they would outlive zero_grad() here
        self.grads = []

    def _evaluate(self, index: int, found: Found) -> tuple[Asked, _Row, Any]:
        row = self._row(index, self.cohort.facts.differentiable)
        asked = Asked(found, row.group_index, row.param.dtype)
        with torch.set_grad_enabled(row.differentiable), answering(asked):
            return asked, row, row.evaluate(self.cohort.program.formula.update)

    def _row(self, index: int, differentiable: bool) -> _Row:
        group = self._now.group(index)
        fields = self.cohort.program.formula.fields.items()
        values = {name: group.get(name, field.default) for name, field in fields}
        numbers = {name: _number(value, differentiable) for name, value in values.items()}
        numbers["grad_scale"] = self.grad_scale
        return _Row(self._now, index, self.grads[index], numbers, differentiable)


def _number(value: Any, differentiable: bool) -> Any:
    """A hyperparameter as the formula sees it: numbers are worked with in float64."""
    if isinstance(value, tuple):
        return tuple(_number(item, differentiable) for item in value)
    if isinstance(value, Tensor) and not (differentiable or is_elsewhere(value)):
        value = value.item()
    if not isinstance(value, Tensor):
        return Number(value) if isinstance(value, float) else value
    return value.reshape(()).to(torch.float64)


class _Row:
    """One parameter with its gradient and state, in the precision of the formula."""

    def __init__(
        self,
        cohort: Cohort,
        index: int,
        grad: Tensor,
        group: Mapping[str, Any],
        differentiable: bool,
    ) -> None:
        self.param, self.state = cohort.params[index], cohort.states[index]
        self.group_index = cohort.group_indices[index]
        self.group = SimpleNamespace(**group)
        self.slots = cohort.program.slots
        self.differentiable = differentiable
        self.rows: Rows = None
        self.grad = grad
        if grad.layout is torch.sparse_coo:
            self.grad = as_it_says(grad).coalesce()
            self.rows = tuple(self.grad.indices())

    def evaluate(self, update: Any) -> tuple[Any, dict[str, Any]]:
        """The new parameter and the state that the formula assigned."""
        grad = self.grad.values() if self.rows else self.grad
        # autograd may need the old value after the parameter has been overwritten
        param = self.param.clone() if self.differentiable else self.param.detach()
        state = _State(self)
        new_param = update(self.read(param), self.read(grad, whole=True), state, self.group)
        return new_param, state.assigned

    def read(self, tensor: Tensor, *, whole: bool = False) -> Tensor:
        """A tensor as the formula sees it."""
        if self.rows and not whole:
            tensor = tensor[self.rows]
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        double = self.param.dtype in (torch.float64, torch.complex128)
        return tensor.to(torch.float64 if double else torch.float32)

    def read_state(self, name: str) -> Any:
        """An entry of the state: a tensor, a number, or None."""
        value = self.state.get(name)
        if self.slots[name].scalar and isinstance(value, Tensor):
            # a number on an accelerator stays there: looking at it would wait
            followed = self.differentiable and value.requires_grad
            if not (followed or is_elsewhere(value)):
                return Number(value.item())
            return value.reshape(()).to(torch.float64)
        return value if value is None else self.read(value)

    def store(self, new_param: Any, assigned: Mapping[str, Any]) -> None:
        """Write what the formula made."""
        for name, value in assigned.items():
            if name == "grad":
                self._store_grad(value)
            else:
                self._store_state(name, value)
        self.write(self.param, new_param)

    def _store_grad(self, value: Tensor) -> None:
        if self.rows:
            indices, shape = self.grad.indices(), self.grad.shape
            value = self._like(value, self.grad.values())
            self.param.grad = torch.sparse_coo_tensor(
                indices, value, shape, is_coalesced=True, check_invariants=False
            )
        elif has_gaps_or_overlaps(self.grad) or self.grad.is_conj() or self.grad.is_neg():
            # elements of a gradient that share memory cannot be written one by one
            self.param.grad = self._like(value, self.grad)
        else:
            self.write(self.grad, value)

    def _store_state(self, name: str, value: Any) -> None:
        old = self.state.get(name)
        if isinstance(value, Tensor) and value.requires_grad and self.slots[name].scalar:
            # autograd may need the old value, and the precision of the new one
            self.state[name] = value
        elif self.slots[name].scalar:
            # fill_() raises where a number is too large for the dtype, instead of giving infinity
            number = torch.as_tensor(value, dtype=torch.float64, device=self.state[name].device)
            _copy(self.state[name], number)
        elif isinstance(old, Tensor) and not self.differentiable:
            self.write(old, value)
        else:
            like = old if isinstance(old, Tensor) else self.param
            self.state[name] = self._like(value, like)

    def _like(self, value: Tensor, like: Tensor) -> Tensor:
        if like.is_complex():
            value = torch.view_as_complex(value.contiguous())
        return value.to(like.dtype).clone(memory_format=torch.preserve_format)

    def write(self, target: Tensor, value: Any) -> None:
        """Overwrite a tensor, or its rows, with a value of the formula."""
        if self.rows:
            target[self.rows] = self._like(value, target)
            return
        if target.is_conj():
            target.copy_(torch.view_as_complex(value.contiguous()))
            return
        target = torch.view_as_real(target) if target.is_complex() else target
        _copy(target, value) if isinstance(value, Tensor) else target.fill_(value)


def _copy(target: Tensor, value: Tensor) -> None:
    if is_fake(target):
        # copy_() asks for the device that a fake tensor is said to be on
        torch._foreach_copy_([target], [value])
    else:
        target.copy_(_cut_as(target, value))


def _cut_as(target: Any, value: Any) -> Any:
    """The value, cut up over processes as the target is if both are DTensors."""
    placements = getattr(target, "placements", None)
    if placements is None or getattr(value, "placements", placements) == placements:
        return value
    return value.redistribute(placements=placements)


class _State:
    """What a formula sees as `state`: reads the entries, keeps what is assigned."""

    def __init__(self, row: _Row) -> None:
        object.__setattr__(self, "_row", row)
        object.__setattr__(self, "assigned", {})

    _row: _Row
    assigned: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name not in self.assigned and name == "step":
            self.assigned["step"] = self._row.read_state("step") + 1
        if name in self.assigned:
            return self.assigned[name]
        return self._row.read_state(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.assigned[name] = value
