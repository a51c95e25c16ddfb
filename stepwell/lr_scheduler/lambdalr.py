"""LambdaLR: the rate is the initial one times a function of the user's."""

from __future__ import annotations

from typing import Any

from .curvelr import started_at
from .functions import FunctionsLR
from .hyperparameters import Number, read


class LambdaLR(FunctionsLR):
    """Multiplies the initial rate of every group by what a function says of the step.

        rate(t) = initial rate * lr_lambda(t)

    `state_dict` holds the attributes of an object that is called, and nothing of a plain function:
    that has to be given again. A group that joins later follows the function that all others share;
    where each has its own, it keeps its rate.

    Args:
        optimizer: whose rates it sets
        lr_lambda: a function of the step, or a list of one per group
        last_epoch: the last step already taken; -1 starts anew

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> LambdaLR(torch.optim.SGD([weight], lr=1.0), lambda step: 1 / (step + 1)).preview(3)
    [[1.0], [0.5], [0.333...]]
    """

    def get_lr(self) -> list[Number]:
        """The rates of the groups at `last_epoch`; for the latest ones call `get_last_lr`."""
        self._warn_outside_of_step()
        return self._values_at(self.last_epoch)["lr"]

    def _initial_of(self, group: dict[str, Any]) -> Number:
        groups = self.optimizer.param_groups
        # by identity: comparing groups would compare their Tensors
        index = [id(other) for other in groups].index(id(group))
        others = read(groups[: len(self.base_lrs)], "lr")
        factor = self._factors(max(self.last_epoch, 0))[index]
        return started_at(group["lr"], 0.0, factor, others)

    def _values_at(self, step: int) -> dict[str, list[Number]]:
        factors = self._factors(step)
        return {"lr": [base * f for base, f in zip(self.base_lrs, factors, strict=True)]}
