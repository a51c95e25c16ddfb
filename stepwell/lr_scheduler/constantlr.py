"""ConstantLR: a smaller rate for the first steps."""

from __future__ import annotations

from torch.optim import Optimizer

from ..language.fields import Field, Range
from .curvelr import CurveLR, remade
from .curves import Curve, constant
from .curves.composition import TOTAL_ITERS


class ConstantLR(CurveLR):
    """Multiplies the rate of every group by `factor` until step `total_iters`.

        rate(t) = initial rate * (factor if t < total_iters else 1)

    Args:
        optimizer: whose rates it sets
        factor: what the rate is multiplied by, in [0, 1]
        total_iters: the step from which the rate is the initial one
        last_epoch: the last step already taken; -1 starts anew

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> scheduler = ConstantLR(torch.optim.SGD([weight], lr=0.5), factor=0.5, total_iters=2)
    >>> scheduler.preview(4)
    [[0.25], [0.25], [0.5], [0.5]]
    """

    fields = (
        Field(
            "factor",
            1 / 3,
            "number",
            Range(0, 1),
            spoken="Constant multiplicative factor expected to be between 0 and 1. Got {value}",
        ),
        TOTAL_ITERS,
    )

    def __init__(
        self,
        optimizer: Optimizer,
        factor: float = 1.0 / 3,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        self.factor = factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    @property
    def curve(self) -> Curve:
        """The curve of its present arguments."""
        return remade(constant, self.factor, self.total_iters) >> constant()
