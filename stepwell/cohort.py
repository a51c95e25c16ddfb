"""Cohort: parameters with equal static facts, which one launch updates together."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .hyperparameters import Hyperparameters, is_elsewhere
from .language import Program
from .language.fields import Slot
from .sparse import as_it_says, check_rows

__all__ = [
    "PLAIN_TYPES",
    "Cohort",
    "Facts",
    "Scaling",
    "UnusableError",
    "facts_hold",
    "facts_of",
    "has_gaps_or_overlaps",
    "is_expanded",
    "is_misshapen",
    "is_unfit",
    "keeps_numbers_on_device",
    "local_part",
    "state_shape",
]

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
"""The types whose memory is what it seems to be; a subclass may mean something else."""


def has_gaps_or_overlaps(tensor: Tensor) -> bool:
    """Whether the elements do not fill one stretch of memory, each once, in some order."""
    if tensor.is_contiguous():
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return True
            expected *= size
    return False


@dataclass(frozen=True)
class Facts:
    """What a back-end must know before it accepts parameters; equal facts share a launch.

    `layout` is "dense", "strided" (gaps, or elements that share memory), "rows" (a sparse gradient
    has rows that are stretches of the parameter's memory), "sparse" (one has not), "sharded" (a
    DTensor, whose part on this device is dense), "subclass" (of Tensor, among parameter, gradient
    and state) or "lazy" (a conjugate or negative that memory does not show).
    `on_device`: the numbers of a parameter (counts, rates) are kept on its device, so that a step
    neither waits for the device nor needs the host when it is replayed.
    `request` is what `foreach`, `fused` and `differentiable` ask for: the name of a back-end, or
    None for the fastest.
    """

    static: tuple[tuple[str, Any], ...]
    absent: frozenset[str]
    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    state_dtypes: tuple[torch.dtype, ...]
    layout: str
    request: str | None
    differentiable: bool
    on_device: bool


class UnusableError(Exception):
    """A back-end turns out not to work here; nothing has changed, another one can take over."""


class Scaling(NamedTuple):
    """What a GradScaler asks of a step: gradients are `grad_scale` too large; not to do anything
    if `found_inf` is not zero. Each is a number, a tensor of one element, or None."""

    grad_scale: Any = None
    found_inf: Any = None


def is_expanded(tensor: Tensor) -> bool:
    """Whether one number in memory is seen as several, as after `expand()`."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return False
    return any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def place_of(group: Mapping[str, Any], index: int, number: int) -> str:
    """What messages call a parameter: its group, and its name or its number there."""
    names = group.get("param_names")
    return f"group {index}, parameter {repr(names[number]) if names else number}"


@dataclass
class Cohort:
    """The parameters of one launch, with their groups and states, in the optimizer's order.

    `aliased` parameters share memory with each other: they must be updated one after the other.
    `densify` says that sparse gradients are made dense. `kept` is what captured graphs read, which
    must live as long as the parameters.
    """

    program: Program
    facts: Facts
    hyperparameters: Hyperparameters
    aliased: bool = False
    densify: bool = False
    params: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    group_indices: list[int] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)

    def group(self, row: int) -> Mapping[str, Any]:
        """The hyperparameters of one parameter."""
        return self.hyperparameters.groups[self.group_indices[row]]

    def gradients(self) -> list[Any]:
        """The gradient of each parameter, or None.

        Raises:
            RuntimeError: a sparse gradient has rows that its parameter has not
        """
        grads = [param.grad for param in self.params]
        if self.densify or self.facts.layout in ("rows", "sparse"):
            for row, grad in enumerate(grads):
                if grad is not None and grad.is_sparse:
                    check_rows(grad, self.gradient_of(row))
        if self.densify:
            return [as_it_says(g).to_dense() if g is not None and g.is_sparse else g for g in grads]
        return grads

    def gradient_of(self, row: int) -> str:
        """The gradient of one parameter, in words."""
        group, index, param = self.group(row), self.group_indices[row], self.params[row]
        number = next(i for i, known in enumerate(group["params"]) if known is param)
        return f"{self.program.name}: the gradient of {place_of(group, index, number)}"

    def present(self) -> tuple[Cohort, list[Tensor]]:
        """The part of the cohort that has gradients in this step, and these."""
        grads = self.gradients()
        rows = [row for row, grad in enumerate(grads) if grad is not None]
        if len(rows) == len(grads):
            return self, grads
        part = replace(
            self,
            params=[self.params[row] for row in rows],
            states=[self.states[row] for row in rows],
            group_indices=[self.group_indices[row] for row in rows],
        )
        return part, [grads[row] for row in rows]

    def state_tensors(self, name: str) -> list[Any]:
        """One entry of the state of each parameter; KeyError if one is missing."""
        return [state[name] for state in self.states]

    def is_sharded(self) -> bool:
        """Whether parameters, gradients and state still are DTensors that are cut up alike."""
        slots = self.program.element_slots
        return all(
            _are_alike_shards(
                param, param if grad is None else grad, [state[n] for n in slots if n in state]
            )
            for param, grad, state in zip(self.params, self.gradients(), self.states, strict=True)
        )


def facts_of(
    program: Program,
    static: tuple[tuple[str, Any], ...],
    tensors: tuple[Tensor, Tensor],
    state: Mapping[str, Any],
    group: Mapping[str, Any],
) -> Facts:
    """The facts of one parameter, its gradient and its state, as they are now."""
    param, grad = tensors
    return Facts(
        static=static,
        absent=frozenset(name for name in program.slots if state.get(name) is None),
        device=param.device,
        param_dtype=param.dtype,
        grad_dtype=grad.dtype,
        state_dtypes=tuple(state[n].dtype for n in program.slots if state.get(n) is not None),
        layout=_layout(program, param, grad, state),
        request=_request(group),
        differentiable=bool(group.get("differentiable")),
        on_device=keeps_numbers_on_device(program, group),
    )


def keeps_numbers_on_device(program: Program, group: Mapping[str, Any]) -> bool:
    """Whether counts, and other state that is one number, lie on the parameter's device."""
    if group.get("capturable") or group.get("fused") or program.feeds_back:
        return True
    values = [group.get(name) for name in program.formula.fields]
    spread = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    return any(map(is_elsewhere, spread))


def _layout(program: Program, param: Tensor, grad: Tensor, state: Mapping[str, Any]) -> str:
    entries = {name: state.get(name) for name in program.element_slots}
    kept = [param, *(entry for entry in entries.values() if entry is not None)]
    if grad.layout is not torch.strided:
        return "rows" if _has_rows(grad, kept) else "sparse"
    if _are_alike_shards(param, grad, kept):
        return "sharded"
    if any(type(tensor) not in PLAIN_TYPES for tensor in (grad, *kept)):
        return "subclass"
    if any(tensor.is_conj() or tensor.is_neg() for tensor in kept):
        return "lazy"
    if program.is_sliced:
        # rows and columns are where the shape says, not where memory has them
        sliced = [
            entry
            for n, entry in entries.items()
            if entry is not None and not program.slots[n].is_whole
        ]
        return "dense" if all(x.is_contiguous() for x in (param, *sliced)) else "strided"
    return "strided" if has_gaps_or_overlaps(param) else "dense"


def _has_rows(grad: Tensor, kept: Sequence[Tensor]) -> bool:
    """Whether a sparse gradient's rows are stretches of the memory of what is `kept`."""
    return (
        grad.layout is torch.sparse_coo
        and all(
            type(tensor) in PLAIN_TYPES and not (tensor.is_conj() or tensor.is_neg())
            for tensor in (grad, *kept)
        )
        and kept[0].is_contiguous()
    )


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor itself."""
    if type(tensor) in PLAIN_TYPES:
        return tensor
    with torch.no_grad():
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]  # of a DTensor
    return local


def _are_alike_shards(param: Any, grad: Any, kept: Sequence[Any]) -> bool:
    """Whether all are DTensors that are cut up, and lie in memory, in the same way."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or any(type(tensor) is not module.DTensor for tensor in (grad, *kept)):
        return False
    if any(placement.is_partial() for placement in param.placements):
        return False
    here = local_part(param)
    if has_gaps_or_overlaps(here) or here.is_conj() or here.is_neg():
        return False
    for tensor in (grad, *kept):
        part = local_part(tensor)
        same_cut = tensor.placements == param.placements and tensor.device_mesh == param.device_mesh
        if not same_cut or type(part) not in PLAIN_TYPES:
            return False
        if part.shape != here.shape or _order(part) != _order(here):
            return False
    return True


def _order(tensor: Tensor) -> list[int]:
    """The strides that matter: those of dimensions of size 1 may be anything."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _request(group: Mapping[str, Any]) -> str | None:
    foreach, fused = group.get("foreach"), group.get("fused")
    if group.get("differentiable"):
        return "eager"
    if fused or foreach:
        return "foreach" if foreach else None
    # torch: False for either asks for the plain loop
    return "eager" if fused is False or foreach is False else None


def facts_hold(cohort: Cohort, grads: Sequence[Tensor]) -> bool:
    """Whether every parameter of the cohort still is what it was when the cohort was formed."""
    facts, slots = cohort.facts, cohort.program.slots
    for row, (param, state) in enumerate(zip(cohort.params, cohort.states, strict=True)):
        grad = grads[row]
        if grad.shape != param.shape:
            return False
        found = facts_of(cohort.program, facts.static, (param, grad), state, cohort.group(row))
        if found != facts or any(is_unfit(slot, param, state.get(n)) for n, slot in slots.items()):
            return False
    return True


def is_unfit(slot: Slot, param: Tensor, value: Tensor | None) -> bool:
    """Whether an entry of the state is missing, has the wrong shape, or lies on another device."""
    if value is None:
        return slot.initial is not None
    return is_misshapen(slot, param, value) or not (slot.scalar or value.device == param.device)


def is_misshapen(slot: Slot, param: Tensor, value: Tensor) -> bool:
    """Whether an entry of the state has the wrong shape."""
    return value.numel() != 1 if slot.scalar else value.shape != state_shape(slot, param)


def state_shape(slot: Slot, param: Tensor) -> torch.Size:
    """The shape of an entry of the state."""
    if slot.scalar:
        return torch.Size()
    shape = list(param.shape)
    if slot.over is not None and shape:
        shape[slot.over] = 1
    return torch.Size(shape)
