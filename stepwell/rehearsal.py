"""Rehearsal: a step that is taken only for the state that it makes.

torch.distributed.checkpoint loads into state that is there, so before the first step it takes one
with rates and gradients of zero, in `_init_optim_state`:
https://github.com/pytorch/pytorch/blob/main/torch/distributed/checkpoint/state_dict.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cohort import local_part
from .language import Formula, program_for
from .language.number import is_fake
from .native.uploads import is_capturing
from .state import create_state

__all__ = ["Made", "begin_anew", "is_rehearsal", "rehearse"]

Group = Mapping[str, Any]

CALLER = "_init_optim_state", "torch.distributed.checkpoint.state_dict"
"""The function that takes the step, and its module."""

DEPTH = 100
"""Largest number of calls between that function and the step: those of hooks and wrappers."""


def is_rehearsal(groups: Sequence[Group], state: Mapping[Any, Any]) -> bool:
    """Return whether no parameter has state and torch.distributed.checkpoint takes the step.

    Rates and gradients cannot tell: the first step of a warm-up may have a rate of zero, and
    gradients of zero too, and it counts.
    """
    params = (param for group in groups for param in group["params"])
    return not any(state.get(param) for param in params) and _is_called_by_torch()


def _is_called_by_torch() -> bool:
    name, module = CALLER
    # most trainings do not import it
    frame = sys._getframe() if module in sys.modules else None
    for _ in range(DEPTH):
        if frame is None:
            return False
        if frame.f_code.co_name == name and frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False


class Made(NamedTuple):
    """The state of a parameter as a rehearsal has made it."""

    param: Tensor
    entries: dict[str, Any]
    values: dict[str, Any]
    sums: list[float]


def rehearse(
    formula: Formula,
    groups: Sequence[Group],
    state: MutableMapping[Any, Any],
    defaults: Mapping[str, Any],
) -> list[Made]:
    """Make the state of each parameter with a gradient, and remember what was made."""
    with torch.inference_mode(False):
        made = _initial_state(formula, groups, defaults)
    state.update(made)
    return [Made(param, entries, dict(entries), _sums(entries)) for param, entries in made.items()]


def _initial_state(
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


def begin_anew(state: MutableMapping[Any, Any], made: Iterable[Made]) -> None:
    """Drop the state that nobody has loaded into: a first step makes its own.

    It knows the group's rate as it is then, and takes the first gradient as it is.
    """
    for param, entries, values, sums in made:
        if (
            state.get(param) is entries
            and entries.keys() == values.keys()
            and all(entries[name] is value for name, value in values.items())
            and not is_capturing(param.device)
            and _sums(entries) == sums
        ):
            del state[param]


def _sums(entries: Mapping[str, Any]) -> list[float]:
    """A number for each tensor that is another one once somebody has loaded into it.

    Versions of tensors do not tell: a broadcast leaves them as they are, and a copy begins anew.
    """
    tensors = [value for value in entries.values() if isinstance(value, Tensor)]
    parts = [local_part(tensor) if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return [0.0 if is_fake(part) else float(part.abs().sum()) for part in parts]
