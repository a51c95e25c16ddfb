"""ExponentialLR: the rate falls by the same factor at every step."""

from __future__ import annotations

from torch.optim import Optimizer

from .curvelr import CurveLR, remade
from .curves import Curve, exponential


class ExponentialLR(CurveLR):
    """Multiplies the rate of every group by `gamma` at every step.

        rate(t) = initial rate * gamma ^ t

    Args:
        optimizer: whose rates it sets
        gamma: what the rate is multiplied by
        last_epoch: the last step already taken; -1 starts anew

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> ExponentialLR(torch.optim.SGD([weight], lr=0.5), gamma=0.5).preview(3)
    [[0.5], [0.25], [0.125]]
    """

    fields = exponential.checks

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    @property
    def curve(self) -> Curve:
        """The curve of its present arguments."""
        return remade(exponential, self.gamma)
