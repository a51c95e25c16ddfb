"""CosineAnnealingLR: the rate follows a cosine down to a floor, and up again."""

from __future__ import annotations

from torch.optim import Optimizer

from ..language.fields import Field, Range
from .curvelr import CurveLR, remade
from .curves import Curve, cosine_wave
from .curves.composition import ETA_MIN
from .hyperparameters import Groups, Number


class CosineAnnealingLR(CurveLR):
    """Leads the rate of every group to `eta_min` in `T_max` steps, along a cosine.

        rate(t) = eta_min + (initial rate - eta_min) (1 + cos(pi t / T_max)) / 2

    After `T_max` steps the rate rises again, as the formula says. One that stays at its floor is
    `Schedule(optimizer, cosine(T_max))`.

    Paper: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts,
    arXiv:1608.03983.

    Args:
        optimizer: whose rates it sets
        T_max: how many steps the way down takes
        eta_min: the lowest rate
        last_epoch: the last step already taken; -1 starts anew

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> CosineAnnealingLR(torch.optim.SGD([weight], lr=1.0), T_max=2).preview(4)
    [[1.0], [0.5], [0.0], [0.499...]]
    """

    fields = (Field("T_max", None, "number", Range(0, open="(")), ETA_MIN)

    def __init__(
        self,
        optimizer: Optimizer,
        T_max: int,  # noqa: N803
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.T_max = T_max
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    @property
    def curve(self) -> Curve:
        """The curve of its present arguments."""
        return remade(cosine_wave, self.T_max)

    def _floors(self, groups: Groups) -> list[Number] | None:
        return [self.eta_min] * len(groups) if self.eta_min else None
