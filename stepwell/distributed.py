"""Classes that torch.distributed looks up by the class of an optimizer.

`DistributedDataParallel._register_fused_optim`, `ZeroRedundancyOptimizer(overlap_with_ddp=True)`
and `as_functional_optim` step with gradients that lie in buckets, not in `param.grad`. They look
for the class in a map of torch's, into which `register` puts ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from . import optimizers
from .optimizer import Optimizer
from .stand_ins import stand_ins, take_step

__all__ = ["FunctionalOptimizer", "register"]


class FunctionalOptimizer:
    """An optimizer that is given its gradients; it has one group, and no hooks.

    Args:
        params: parameters that `step` updates
        args, kwargs: hyperparameters, as the constructor of the rule takes them

    Attributes:
        param_group: the group; torch looks at its "params"
        state: what is kept for each parameter
        defaults: the hyperparameters
    """

    rule: ClassVar[type[Optimizer]]

    def __init__(
        self,
        params: Sequence[Tensor],
        *args: Any,
        _allow_empty_param_list: bool = False,
        **kwargs: Any,
    ) -> None:
        declaration = self.rule.declaration
        if not (params or _allow_empty_param_list):
            raise ValueError(f"optimizer got an empty parameter list ({type(self).__name__})")
        self.defaults = declaration.bind(args, kwargs)
        self.param_group: dict[str, Any] = {"params": list(params)}
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._options = {f.name: self.defaults[f.name] for f in declaration.arguments}
        self._held: dict[tuple[int, ...], Optimizer] = {}

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Update the parameters of the group whose gradient is not None."""
        params = self.param_group["params"]
        if len(params) != len(gradients):
            raise ValueError(
                "the gradients passed in does not equal to the size of the parameters! Params "
                f"length: {len(params)}. Gradients length: {len(gradients)} ({type(self).__name__})"
            )
        self._step(params, gradients)

    def step_param(self, param: Tensor, grad: Tensor | None) -> None:
        """Update one parameter, which need not be in the group."""
        if grad is not None:
            self._step([param], [grad])

    def _step(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        key = tuple(map(id, params))
        optimizer = self._held.get(key)
        if optimizer is None or not _lie_where_they_lay(optimizer, params):
            optimizer = self._held[key] = stand_ins(self.rule, self._options, params)
        take_step(optimizer, grads, [self.state.setdefault(param, {}) for param in params])


def _lie_where_they_lay(optimizer: Optimizer, params: Sequence[Tensor]) -> bool:
    """Return whether the parameters still lie in the memory that the optimizer updates."""
    members = optimizer.param_groups[0]["params"]
    return all(m.data_ptr() == p.data_ptr() for m, p in zip(members, params, strict=True))


def register(module: Any) -> None:
    """Put a class that steps as it does beside each of our rules that is a formula.

    Args:
        module: torch.distributed.optim.utils
    """
    for rule in vars(optimizers).values():
        if inspect.isclass(rule) and issubclass(rule, Optimizer) and rule.declaration.slots:
            name = f"Functional{rule.__name__}"
            module.register_functional_optim(
                rule, type(name, (FunctionalOptimizer,), {"rule": rule})
            )
