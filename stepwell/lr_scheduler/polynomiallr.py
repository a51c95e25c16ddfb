"""PolynomialLR: the rate falls to zero as a power of the steps that are left."""

from __future__ import annotations

from torch.optim import Optimizer

from .curvelr import CurveLR, remade
from .curves import Curve, polynomial
from .curves.composition import TOTAL_ITERS


class PolynomialLR(CurveLR):
    """Multiplies the rate of every group by a power of the share of steps that is left.

        rate(t) = initial rate * (1 - min(t / total_iters, 1)) ^ power

    One that falls to a floor above zero is `Schedule(optimizer, polynomial(1000, 2.0, end=0.1))`.

    Args:
        optimizer: whose rates it sets
        total_iters: the step from which the rate is zero
        power: 1 is a straight line; a larger one falls faster at first
        last_epoch: the last step already taken; -1 starts anew

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> PolynomialLR(torch.optim.SGD([weight], lr=1.0), total_iters=4, power=2.0).preview(5)
    [[1.0], [0.5625], [0.25], [0.0625], [0.0]]
    """

    fields = (TOTAL_ITERS, *polynomial.checks)

    def __init__(
        self,
        optimizer: Optimizer,
        total_iters: int = 5,
        power: float = 1.0,
        last_epoch: int = -1,
    ) -> None:
        self.total_iters = total_iters
        self.power = power
        super().__init__(optimizer, last_epoch)

    @property
    def curve(self) -> Curve:
        """The curve of its present arguments."""
        return remade(polynomial, self.total_iters, self.power)
