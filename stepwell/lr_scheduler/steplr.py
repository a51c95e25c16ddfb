"""StepLR: the rate falls by a constant factor at regular intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from .curvelr import CurveLR, remade
from .curves import Curve, step
from .curves.composition import whole


class StepLR(CurveLR):
    """Multiplies the rate of every group by `gamma` once in `step_size` steps.

        rate(t) = initial rate * gamma ^ floor(t / step_size)

    Args:
        optimizer: whose rates it sets
        step_size: how many steps lie between two changes
        gamma: what the rate is multiplied by at each change
        last_epoch: the last step already taken; -1 starts anew

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> scheduler = StepLR(optimizer, step_size=2, gamma=0.5)
    >>> for _ in range(5):
    ...     print(scheduler.get_last_lr())
    ...     optimizer.step()
    ...     scheduler.step()
    [0.5]
    [0.5]
    [0.25]
    [0.25]
    [0.125]
    """

    fields = step.checks

    def __init__(
        self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _check_arguments(self, state: Mapping[str, Any]) -> None:
        super()._check_arguments({name: whole(value) for name, value in state.items()})

    @property
    def curve(self) -> Curve:
        """The curve of its present arguments."""
        return remade(step, self.step_size, self.gamma)
