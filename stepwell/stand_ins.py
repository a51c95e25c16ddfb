"""Stand-ins: an optimizer that is given its gradients, and keeps its hands off `param.grad`.

For functions on lists of tensors, and for gradients that lie in buckets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .declaration import tensors_in
from .optimizer import Optimizer
from .param_groups import add_group

__all__ = ["stand_ins", "take_step"]


def stand_ins(
    rule: type[Optimizer], options: Mapping[str, Any], params: Sequence[Tensor]
) -> Optimizer:
    """An optimizer without state, of tensors in the memory of `params`, whose `grad` it alone sees.

    Raises:
        ValueError, TypeError, RuntimeError: a hyperparameter is out of range
    """
    defaults = rule.declaration.bind((), options)
    # a view, so that autograd follows; but of a leaf it would be refused in torch's words alone
    follows = bool(defaults.get("differentiable"))
    members = [
        param.detach() if not follows else param if param.is_leaf else param.view_as(param)
        for param in params
    ]
    optimizer = rule.__new__(rule)
    optimizer.defaults = defaults
    given = {**tensors_in(defaults), "params": members}
    group = add_group(given, defaults, rule.declaration, [])
    optimizer.__setstate__({"param_groups": [group], "state": {}})
    return optimizer


def take_step(
    optimizer: Optimizer,
    grads: Sequence[Tensor | None],
    states: Sequence[dict[str, Any]],
    **scaling: Any,
) -> None:
    """Step an optimizer from `stand_ins` with these gradients; `states` are updated in place."""
    members = optimizer.param_groups[0]["params"]
    optimizer.state.update(zip(members, states, strict=True))
    vars(optimizer).update(scaling)
    try:
        for member, grad in zip(members, grads, strict=True):
            if grad is not None and grad.dtype is not member.dtype:
                member.grad_dtype = None
            member.grad = grad
        with torch.set_grad_enabled(bool(optimizer.defaults.get("differentiable"))):
            optimizer._prepare()()
    finally:
        for member in members:
            member.grad = None
