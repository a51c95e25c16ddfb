"""How many bytes a step of a rule moves and holds per element, worked out from its program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

import stepwell
from stepwell.language import program_for
from stepwell.language.expr import Kind
from stepwell.native.schedule import Schedule

__all__ = ["Traffic", "traffic"]


class Traffic(NamedTuple):
    """Bytes per element.

    `moved` counts each read and each write of a sweep over the elements; `held` is the memory of
    parameter, gradient and state.
    """

    moved: int
    held: int


def traffic(rule: str, dtype: torch.dtype, settings: Mapping[str, Any]) -> Traffic:
    """What a later step of a rule moves: one whose state is there, with its dtypes."""
    param = torch.nn.Parameter(torch.ones(1, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = getattr(stepwell, rule)([param], **settings)
    optimizer.step()
    program = program_for(getattr(stepwell, rule).formula, optimizer.param_groups[0])
    kept = {name: tensor.dtype for name, tensor in optimizer.state[param].items()}
    schedule = Schedule(program, {"param": dtype, "grad": dtype, **kept})
    size = {name: schedule.dtypes[name].itemsize for name in schedule.elements}
    touched: list[str] = []
    for k in range(schedule.sweeps):
        leaves = [n for n in schedule.wanted(k) if n.kind is Kind.ELEMENT and not n.args]
        touched += [*(str(node.value) for node in leaves), *schedule.stores_at(k)]
    return Traffic(sum(size[name] for name in touched), sum(size.values()))
