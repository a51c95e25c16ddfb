"""The state of a parameter: what is made for it before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cohort import is_expanded, keeps_numbers_on_device, state_shape
from .language import Program
from .language.fields import Slot

__all__ = ["create_state"]


def create_state(
    program: Program, group: Mapping[str, Any], param: Tensor, have: Mapping[str, Any] = {}
) -> dict[str, Tensor]:
    """The state of a parameter that is not there yet, or not as a tensor on the right device.

    What starts unset is left out.
    """
    made: dict[str, Tensor] = {}
    for name, slot in program.slots.items():
        value = have.get(name)
        follows = not slot.scalar or keeps_numbers_on_device(program, group)
        home = param.device if follows else torch.device("cpu")
        if isinstance(value, Tensor):
            if slot.scalar and value.dtype not in (torch.float32, torch.float64):
                # in half precision a count would stand still at 256, or at 2048
                made[name] = value.to(home, _scalar_dtype())
            elif value.device != home:
                made[name] = value.to(home)
            elif is_expanded(value):
                # put in by hand: what is written to one element would be written to others
                made[name] = value.clone(memory_format=torch.contiguous_format)
        elif value is None and _is_followed(slot, group, param):
            made[name] = _following(slot, group, param)
        elif slot.initial == "param":
            made[name] = param.detach().to(_dtype(slot, param), copy=True)
        elif slot.scalar:
            number = _initial(slot, group) if value is None else float(value)
            # not torch.tensor(), which waits for a device
            made[name] = torch.full((), number, dtype=_scalar_dtype(), device=home)
        elif slot.initial is not None:
            made[name] = _filled(param, slot, _initial(slot, group))
    return made


def _is_followed(slot: Slot, group: Mapping[str, Any], param: Tensor) -> bool:
    """Return whether autograd shall track this entry back to the value it starts at."""
    source = _source(slot, group, param)
    followed = isinstance(source, Tensor) and source.requires_grad
    return followed and bool(group.get("differentiable"))


def _source(slot: Slot, group: Mapping[str, Any], param: Tensor) -> Any:
    """The parameter, the hyperparameter or the number that an entry starts at."""
    if slot.initial == "param":
        return param
    return group[slot.initial] if isinstance(slot.initial, str) else slot.initial


def _following(slot: Slot, group: Mapping[str, Any], param: Tensor) -> Tensor:
    source: Tensor = _source(slot, group, param)
    with torch.enable_grad():
        if source is param:
            return param.to(_dtype(slot, param), copy=True)
        if slot.scalar:
            # in its own precision, or differences would be lost in rounding
            return source.reshape(()).clone()
        made = _filled(param, slot, 0.0)
        return made + source.reshape(()).to(made.dtype)


def _dtype(slot: Slot, param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32) if slot.wide else param.dtype


def _initial(slot: Slot, group: Mapping[str, Any]) -> float:
    initial = slot.initial
    value = group[initial] if isinstance(initial, str) else initial or 0
    # item() because float() warns of a number that autograd follows
    return float(value.item() if isinstance(value, Tensor) else value)


def _filled(param: Tensor, slot: Slot, value: float) -> Tensor:
    shape, dtype = state_shape(slot, param), _dtype(slot, param)
    with torch.no_grad():
        if shape != param.shape:
            like = param.new_empty(shape, dtype=dtype)
        else:
            like = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
        # the gradient's real and imaginary parts are numbers of their own
        like = like.detach()
        (torch.view_as_real(like) if like.is_complex() else like).fill_(value)
    return like


def _scalar_dtype() -> torch.dtype:
    # as torch: a count in float32 unless the whole session is in float64
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32
