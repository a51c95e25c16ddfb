"""Inspection: what is refused before a step, so that nothing is ever half done.

Everything is looked at, and nothing changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cohort import is_expanded, is_misshapen, keeps_numbers_on_device, place_of, state_shape
from .language import Formula, Program
from .language.expr import NoDimensionError
from .language.program import program_for
from .sparse import check_rows

__all__ = ["CAPTURABLE", "Group", "Inspection", "Row", "check_dense", "check_unexpanded"]

FUSED = ("mps", "cuda", "xpu", "hpu", "cpu", "mtia", torch._C._get_privateuse1_backend_name())
"""Where `fused=True` may be asked for, in torch's order."""

CAPTURABLE = ("cuda", "xpu", "hpu", torch._C._get_privateuse1_backend_name(), "xla")
"""Where a graph of work can be captured, in torch's order."""

Group = dict[str, Any]


class Row(NamedTuple):
    """A parameter, its group, and its number in the group."""

    group: int
    number: int
    param: Tensor
    program: Program


class Inspection:
    """A look at everything that a step would use.

    Args:
        formula, groups, state: the optimizer's
        grad_scale: what gradients are to be divided by, or None
        densify: whether sparse gradients are made dense
        sparse_only: whether dense ones are refused
        known: the dtypes of the gradients of parameters that have been stepped before, by id;
            these keep their place while they have no gradient, so that gradients may come and go
    """

    def __init__(
        self,
        formula: Formula,
        groups: list[Group],
        state: dict[Tensor, dict[str, Any]],
        *,
        grad_scale: Any,
        densify: bool,
        sparse_only: bool = False,
        known: Mapping[int, torch.dtype],
    ) -> None:
        self._formula = formula
        self._groups = groups
        self._state = state
        self._grad_scale = grad_scale
        self._densify = densify
        self._sparse_only = sparse_only
        self._known = known

    def rows(self) -> list[Row]:
        """The parameters that a step updates, or a refusal."""
        rows = []
        programs: dict[Any, Program] = {}
        for index, group in enumerate(self._groups):
            for number, param in enumerate(group["params"]):
                _refuse_nested(self._formula.name, param, place_of(group, index, number))
                have, ndim = self._state.get(param, {}), param.dim()
                if (index, ndim) not in programs:
                    programs[index, ndim] = self._program_of(index, number)
                whole = programs[index, ndim]
                if param.grad is None and not self._keeps_place(param, whole, have):
                    continue
                absent = frozenset(
                    n for n, s in whole.slots.items() if s.initial is None and _lacks(have, n)
                )
                if (index, ndim, absent) not in programs:
                    programs[index, ndim, absent] = self._program(group, absent, ndim)
                row = Row(index, number, param, programs[index, ndim, absent])
                self._check_row(row, group, have)
                rows.append(row)
        self._check_totals({row.program for row in rows})
        return rows

    def _check_totals(self, programs: set[Program]) -> None:
        """The first total over all parameters must be the same sum for each of them, and so on."""
        asked = {
            tuple((i, n.op) for i, n in enumerate(program.totals) if n.value == "all")
            for program in programs
        }
        if len(asked - {()}) > 1:
            raise RuntimeError(
                f"{self._formula.name}: its groups ask for different totals with across='all', "
                "which cannot be added up; give them the same flags, or ask in the same order"
            )

    def _keeps_place(self, param: Tensor, program: Program, have: Any) -> bool:
        if self._sparse_only:
            # it would keep the place of a dense one
            return False
        known = self._known.get(id(param)) is param.dtype
        return known and not any(_lacks(have, name) for name in program.slots)

    def _program(self, group: Group, absent: frozenset[str], ndim: int) -> Program:
        return program_for(self._formula, {**group, "grad_scale": self._grad_scale}, absent, ndim)

    def _program_of(self, index: int, number: int) -> Program:
        """The program of a parameter whose state is whole."""
        group = self._groups[index]
        param = group["params"][number]
        try:
            return self._program(group, frozenset(), param.dim())
        except NoDimensionError as error:
            where = place_of(group, index, number)
            raise RuntimeError(f"{error} ({where} has shape {tuple(param.shape)})") from error

    def _check_row(self, row: Row, group: Group, have: Any) -> None:
        param, name = row.param, self._formula.name
        if not isinstance(have, dict):
            raise TypeError(
                f"{name}: the state of {self._where(row)} must be a dict, got {type(have).__name__}"
            )
        if param.is_complex() and row.program.ndim is not None:
            raise RuntimeError(
                f"{name} does not support complex parameters ({self._where(row)} is "
                f"{param.dtype}: leave it to AdamW)"
            )
        if not (param.is_floating_point() or param.is_complex()):
            raise RuntimeError(
                f"{name} updates floating point and complex parameters, got {param.dtype} "
                f"({self._where(row)}): leave it out of the optimizer"
            )
        if group.get("fused") and param.device.type not in FUSED:
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported "
                f"devices: {list(FUSED)} but {param.dtype} and {param.device.type} ({name}, "
                f"{self._where(row)}: leave fused=None, and the fastest that runs there is used)"
            )
        if group.get("capturable") and param.device.type not in CAPTURABLE:
            raise AssertionError(
                "If capturable=True, params and state_steps must be on supported devices: "
                f"{list(CAPTURABLE)}. ({name}, {self._where(row)} is on {param.device}: "
                "leave capturable=False)"
            )
        check_unexpanded(name, param, self._where(row))
        if group.get("differentiable") and param.is_leaf and param.requires_grad:
            raise RuntimeError(
                "a leaf Variable that requires grad is being used in an in-place operation. "
                f"({name}, {self._where(row)}: differentiable=True steps a clone of the parameter)"
            )
        self._check_state(row, have)
        if param.grad is not None:
            self._check_grad(row, param, param.grad)
        check_dense(name, param, self._where(row))

    def _check_grad(self, row: Row, param: Tensor, grad: Tensor) -> None:
        name = self._formula.name
        replaced = "was the parameter replaced after backward()? Call zero_grad() and backward()"
        if grad.device != param.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{param.device} and {grad.device}! ({name}: the second is that of the gradient of "
                f"{self._where(row)}; {replaced} again)"
            )
        if grad.shape != param.shape:
            raise RuntimeError(
                f"{name}: the gradient of {self._where(row)} has shape {tuple(grad.shape)}, its "
                f"parameter {tuple(param.shape)}; {replaced} again"
            )
        if grad.is_complex() != param.is_complex():
            raise RuntimeError(
                f"{name}: the gradient of {self._where(row)} is {grad.dtype}, its parameter "
                f"{param.dtype}: one is complex, the other is not"
            )
        if grad.layout is torch.sparse_coo:
            self._check_sparse(row, grad)
        elif self._sparse_only:
            raise RuntimeError(
                f"{name} does not support dense gradients, please consider Adam instead "
                f"({self._where(row)} has a gradient of layout {grad.layout}; {name} is for "
                "sparse_coo: sparse=True in torch.nn.Embedding)"
            )
        elif grad.layout is not torch.strided:
            raise self._refused_layout(row, grad)

    def _check_state(self, row: Row, have: Mapping[str, Any]) -> None:
        param, name = row.param, self._formula.name
        for key, slot in row.program.slots.items():
            value = have.get(key)
            if value is not None and not slot.scalar:
                self._check_kind(row, key, value)
            if slot.scalar and not (value is None or isinstance(value, (int, float, Tensor))):
                raise ValueError(
                    f"{name}: state[{key!r}] of {self._where(row)} must be a number, got {value!r}"
                )
            if isinstance(value, Tensor) and value.layout is not torch.strided:
                raise ValueError(
                    f"{name}: state[{key!r}] of {self._where(row)} has layout {value.layout}; "
                    "make it dense: .to_dense()"
                )
            if isinstance(value, Tensor) and is_misshapen(slot, param, value):
                raise ValueError(
                    f"{name}: state[{key!r}] of {self._where(row)} has shape {tuple(value.shape)}, "
                    f"expected {tuple(state_shape(slot, param))}"
                )

    def _check_kind(self, row: Row, key: str, value: Any) -> None:
        """An entry of the state with many numbers is a tensor of numbers like its parameter's."""
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        is_number = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        if not is_number or value.is_complex() != row.param.is_complex():
            raise ValueError(
                f"{self._formula.name}: state[{key!r}] of {self._where(row)} is {found}; it must "
                f"be a tensor of such numbers as the parameter's ({row.param.dtype})"
            )

    def _check_sparse(self, row: Row, grad: Tensor) -> None:
        if not (row.program.is_idle or self._densify or self._sparse_only):
            raise self._refused_layout(row, grad)
        check_rows(grad, f"{self._formula.name}: the gradient of {self._where(row)}")

    def _refused_layout(self, row: Row, grad: Tensor) -> RuntimeError:
        return RuntimeError(
            f"{self._formula.name} does not support sparse gradients, please consider SparseAdam "
            f"instead ({self._where(row)} has a gradient of layout {grad.layout}; or make the "
            "gradient dense: sparse=False in torch.nn.Embedding)"
        )

    def _where(self, row: Row) -> str:
        return place_of(self._groups[row.group], row.group, row.number)

    def check_capturable(self, device: torch.device) -> None:
        """A graph repeats what the device did; what the host did would stay as it is now.

        Raises:
            RuntimeError: a group's numbers are kept on the host
        """
        name = self._formula.name
        words = (
            f"Attempting {device.type.upper()} graph capture of step() for an instance of {name} "
            "but param_groups' capturable is False."
        )
        for index, group in enumerate(self._groups):
            if group.get("capturable") is False:
                raise RuntimeError(
                    f"{words} (group {index}: construct it with capturable=True, and take a step "
                    "before the capture)"
                )
            program = self._program(group, frozenset(), 2)
            if program.scalar_slots and not keeps_numbers_on_device(program, group):
                raise RuntimeError(
                    f"{words} (group {index}: {name} counts its steps on the host; construct it "
                    "with fused=True, and take a step before the capture)"
                )


def _lacks(state: Any, name: str) -> bool:
    return not isinstance(state, dict) or state.get(name) is None


def check_unexpanded(owner: str, param: Tensor, where: str) -> None:
    """Refuse a parameter of which one number in memory is seen as several.

    Raises:
        RuntimeError: it is one, as after `expand()`
    """
    if is_expanded(param):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to "
            "a single memory location. Please clone() the tensor before performing the "
            f"operation. ({owner}: {where} is expanded)"
        )


def _refuse_nested(owner: str, param: Tensor, where: str) -> None:
    if param.is_nested:
        raise RuntimeError(
            f"{owner} does not support nested tensors ({where}): optimize what they are made of, "
            "or torch.nested.to_padded_tensor(parameter, 0.0)"
        )


def check_dense(owner: str, param: Tensor, where: str) -> None:
    """Refuse a parameter of which memory holds only some numbers.

    Raises:
        RuntimeError: it is sparse or nested
    """
    _refuse_nested(owner, param, where)
    if param.layout is not torch.strided:
        raise RuntimeError(
            f"{owner} updates dense parameters, got layout {param.layout} ({where}): make it "
            "dense, .to_dense(); its gradient may be sparse"
        )
