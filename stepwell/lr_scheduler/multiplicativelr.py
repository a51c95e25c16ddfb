"""MultiplicativeLR: the rate is multiplied by what a function says, step by step."""

from __future__ import annotations

from .functions import FunctionsLR
from .hyperparameters import Number, read
from .watch import copied


class MultiplicativeLR(FunctionsLR):
    """Multiplies the rate of every group by what a function says of the step.

        rate(t) = rate(t - 1) * lr_lambda(t)

    There is no closed form: to resume from a step count alone is to call the function for all steps
    up to there. Functions and objects are saved as `LambdaLR` saves them.

    Args:
        optimizer: whose rates it sets
        lr_lambda: a function of the step, or a list of one per group
        last_epoch: the last step already taken; -1 starts anew

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> MultiplicativeLR(torch.optim.SGD([weight], lr=1.0), lambda step: 0.5).preview(3)
    [[1.0], [0.5], [0.25]]
    """

    def get_lr(self) -> list[Number]:
        """The rates of the groups at `last_epoch`; for the latest ones call `get_last_lr`."""
        self._warn_outside_of_step()
        held = read(self.optimizer.param_groups, "lr")
        if self._is_initial:
            return [copied(rate) for rate in held]
        return [
            rate * factor for rate, factor in zip(held, self._factors(self.last_epoch), strict=True)
        ]
