"""LinearLR: the rate moves along a straight line for the first steps."""

from __future__ import annotations

from torch.optim import Optimizer

from ..language.fields import Field, Range
from .curvelr import CurveLR, remade
from .curves import Curve, linear
from .curves.composition import TOTAL_ITERS


class LinearLR(CurveLR):
    """Multiplies the rate of every group by a factor on a straight line, until `total_iters`.

        rate(t) = initial rate * (start_factor (1 - u) + end_factor u),  u = min(t / total_iters, 1)

    Args:
        optimizer: whose rates it sets
        start_factor: the factor of the first step, in (0, 1]
        end_factor: the factor from step `total_iters` on, in [0, 1]
        total_iters: how many steps the way takes
        last_epoch: the last step already taken; -1 starts anew

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> scheduler = LinearLR(torch.optim.SGD([weight], lr=0.5), start_factor=0.5, total_iters=2)
    >>> scheduler.preview(4)
    [[0.25], [0.375], [0.5], [0.5]]
    """

    fields = (
        Field(
            "start_factor",
            1 / 3,
            "number",
            Range(0, 1, open="("),
            spoken="Starting multiplicative factor expected to be greater than 0 and less or equal "
            "to 1. Got {value}",
        ),
        Field(
            "end_factor",
            1.0,
            "number",
            Range(0, 1),
            spoken="Ending multiplicative factor expected to be between 0 and 1. Got {value}",
        ),
        TOTAL_ITERS,
    )

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        self.start_factor = start_factor
        self.end_factor = end_factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    @property
    def curve(self) -> Curve:
        """The curve of its present arguments."""
        return remade(linear, self.start_factor, self.end_factor, self.total_iters)
