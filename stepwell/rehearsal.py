"""Rehearsal: a step that is taken only for the state that it makes.

torch.distributed.checkpoint loads into state that is there, so before the first step it takes one
with rates and gradients of zero:
https://github.com/pytorch/pytorch/blob/main/torch/distributed/checkpoint/state_dict.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .language import Formula, program_for
from .native.uploads import is_capturing
from .state import create_state

__all__ = ["initial_state", "is_rehearsal"]

Group = Mapping[str, Any]


def is_rehearsal(groups: Sequence[Group], state: Mapping[Any, Any]) -> bool:
    """Whether no parameter has state, all rates are zero, and so are all gradients.

    A warm-up that starts at a rate of zero has gradients that are not.
    """
    # quick to say no, for it is asked before each first step
    if not all(_is_zero(group.get("lr")) for group in groups):
        return False
    params = [param for group in groups for param in group["params"]]
    grads = [param.grad for param in params if param.grad is not None]
    if not grads or any(state.get(param) for param in params):
        return False
    return not any(map(_is_unknown, grads)) and not any(bool(grad.any()) for grad in grads)


def _is_zero(rate: Any) -> bool:
    if isinstance(rate, Tensor):
        return not (_is_unknown(rate) or is_capturing(rate.device)) and not bool(rate)
    return bool(rate == 0)


def _is_unknown(tensor: Tensor) -> bool:
    """Whether its numbers cannot be looked at."""
    fake = tensor.is_meta or type(tensor).__name__ == "FakeTensor"
    return fake or tensor.layout is not torch.strided or is_capturing(tensor.device)


def initial_state(
    formula: Formula, groups: Sequence[Group], defaults: Mapping[str, Any]
) -> dict[Tensor, dict[str, Any]]:
    """The state of each parameter with a gradient as a load would find it: all entries, no step.

    What would start at a rate starts at the one that the step was given before it became zero.
    """
    made: dict[Tensor, dict[str, Any]] = {}
    for group in groups:
        rate = group.get("initial_lr", defaults.get("lr"))
        for param in group["params"]:
            if param.grad is not None:
                program = program_for(formula, group, ndim=param.dim())
                entries = create_state(program, {**group, "lr": rate}, param)
                unset = [name for name, slot in program.slots.items() if slot.initial is None]
                entries |= {name: torch.zeros_like(param.detach()) for name in unset}
                if entries:
                    made[param] = entries
    return made
