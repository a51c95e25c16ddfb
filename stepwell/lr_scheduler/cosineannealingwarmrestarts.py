"""CosineAnnealingWarmRestarts: the rate follows a cosine down, and starts again at the top."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from ..compiling import skipped
from ..language.fields import Field, Range
from .curvelr import CurveLR, along, remade
from .curves import cosine, cosine_restarts
from .curves.composition import ETA_MIN
from .hyperparameters import Groups, Number
from .scheduler import require_epoch, require_positive_integer

STANDS = (
    Field("T_i", None, "number", Range(0, open="(")),
    Field("T_cur", None, "number", Range(-1)),
)


class CosineAnnealingWarmRestarts(CurveLR):
    """Leads the rate of every group to `eta_min` along a cosine, then starts at the top again.

        rate(t) = eta_min + (initial rate - eta_min) (1 + cos(pi T_cur / T_i)) / 2

    where `T_cur` steps have been taken since the latest restart, and `T_i` are taken between two.

    Paper: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts,
    arXiv:1608.03983.

    Args:
        optimizer: whose rates it sets
        T_0: how many steps there are before the first restart
        T_mult: how many times longer each cycle is than the one before it
        eta_min: the lowest rate
        last_epoch: the last step already taken; -1 starts anew

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> CosineAnnealingWarmRestarts(torch.optim.SGD([weight], lr=1.0), T_0=2).preview(4)
    [[1.0], [0.5], [1.0], [0.5]]
    """

    chains = False

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: int,  # noqa: N803
        T_mult: int = 1,  # noqa: N803
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.T_0 = T_0
        self.T_i = T_0
        self.T_mult = T_mult
        self.eta_min = eta_min
        self.T_cur: float = last_epoch
        super().__init__(optimizer, last_epoch)

    @property
    def curve(self) -> cosine_restarts:
        """The curve of its present arguments."""
        return remade(cosine_restarts, self.T_0, self.T_mult)

    def get_lr(self) -> list[Number]:
        """The rates of the groups at `last_epoch`; for the latest ones call `get_last_lr`."""
        self._warn_outside_of_step()
        floors = self._floors(self.optimizer.param_groups)
        return along(self.base_lrs, floors, self._value_now())

    def _value_now(self) -> float:
        return cosine(self.T_i)(max(self.T_cur, 0))

    @skipped
    def step(self, epoch: float | None = None) -> None:
        """Move on by one step, after the optimizer's own `step`, or go to an epoch.

        Args:
            epoch: where to go; it may have a fraction, such as epoch + batch / batches

        Raises:
            ValueError: `epoch` is negative; nothing is changed
        """
        if epoch is None:
            super().step()
        else:
            self._update_lr(epoch)

    def _update_lr(self, epoch: float | None = None) -> None:
        if epoch is not None:
            epoch = require_epoch(epoch, type(self).__name__)
        self._follow_groups()
        self.T_cur, self.T_i = self._cycle(epoch)
        super()._update_lr(epoch)  # type: ignore[arg-type]
        self.last_epoch = math.floor(self.last_epoch)

    def _cycle(self, epoch: float | None) -> tuple[float, int]:
        """Where in which cycle the next step, or this epoch, lies."""
        if epoch is not None or self._is_initial or self.last_epoch < 0:
            return self.curve.cycle(self.last_epoch + 1 if epoch is None else epoch)
        since = self.T_cur + 1
        if since < self.T_i:
            return since, self.T_i
        return since - self.T_i, self.T_i * self.T_mult

    def _floors(self, groups: Groups) -> list[Number] | None:
        return [self.eta_min] * len(groups) if self.eta_min else None

    def _check_arguments(self, state: Mapping[str, Any]) -> None:
        owner = type(self).__name__
        if "T_0" in state:
            require_positive_integer("T_0", state["T_0"], owner)
        multiple, lowest = state.get("T_mult", 1), state.get("eta_min", 0.0)
        if not isinstance(multiple, int) or multiple < 1:
            raise ValueError(
                f"Expected integer T_mult >= 1, but got {multiple} ({owner}: T_mult must be a "
                "whole number in [1, inf))"
            )
        if not isinstance(lowest, (float, int)):
            raise ValueError(
                f"Expected float or int eta_min, but got {lowest} of type {type(lowest)} "
                f"({owner}: eta_min must be a number in [0, inf))"
            )
        ETA_MIN.check(lowest, owner)
        for field in STANDS:
            if field.name in state:
                field.check(state[field.name], owner)

    def _take_state(self, state: dict[str, Any]) -> None:
        super()._take_state(state)
        if "T_cur" not in state and "last_epoch" in state:
            self.T_cur, self.T_i = self.curve.cycle(max(self.last_epoch, 0))
