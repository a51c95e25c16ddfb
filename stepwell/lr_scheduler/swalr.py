"""SWALR: the rate goes to the one at which weights are averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch.optim import Optimizer

from ..language.fields import Field, Range
from .curvelr import CurveLR, remade
from .curves import Curve, constant, cosine, linear
from .curves.one_cycle import SHAPES
from .hyperparameters import Groups, Number, holds_tensors, read
from .scheduler import per_group, require_optimizer, require_shape
from .watch import copied, settle, watch

SWA_LR = Field("swa_lr", None, "number", Range(0))


class SWALR(CurveLR):
    """Leads the rate of every group from what it is to `swa_lr`, where it stays.

        rate(t) = swa_lr + (rate - swa_lr) a(t)

    where a falls from 1 to 0 in `anneal_epochs` steps. It may work on rates that another schedule
    has set before: each step closes the share of the distance that is due.

    Paper: Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization,
    arXiv:1803.05407.

    Args:
        optimizer: whose rates it sets
        swa_lr: where to go, or a list of one per group
        anneal_epochs: how many steps the way takes; 0 goes there at once
        anneal_strategy: the form of the way, "cos" or "linear"
        last_epoch: the last step already taken; -1 starts anew

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> SWALR(optimizer, swa_lr=0.5, anneal_epochs=2, anneal_strategy="linear").preview(4)
    [[1.0], [0.75], [0.5], [0.5]]
    """

    kept_in_groups = ("swa_lr",)

    def __init__(
        self,
        optimizer: Optimizer,
        swa_lr: float,
        anneal_epochs: int = 10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        last_epoch: int = -1,
    ) -> None:
        owner = type(self).__name__
        require_optimizer(optimizer, owner)
        rates = [
            SWA_LR.check(rate, owner) for rate in per_group(swa_lr, optimizer, "swa_lr", owner)
        ]
        self.anneal_epochs = copied(anneal_epochs)
        self._anneal_strategy = anneal_strategy
        self._check_arguments(vars(self))
        # before anything is written, since what was loaded has to be remembered
        watch(optimizer)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["swa_lr"] = rate
        settle(optimizer)
        super().__init__(optimizer, last_epoch)

    @property
    def curve(self) -> Curve:
        """How much of the distance is left."""
        if self.anneal_epochs == 0:
            return constant(0.0)
        if self._anneal_strategy == "cos":
            return remade(cosine, self.anneal_epochs)
        return remade(linear, 1.0, 0.0, self.anneal_epochs)

    @property
    def anneal_func(self) -> Callable[[float], float]:
        """How much of the distance is closed after a share of the steps."""
        return SHAPES[self._anneal_strategy]

    def get_lr(self) -> list[Number]:
        """The rates of the groups at `last_epoch`; for the latest ones call `get_last_lr`."""
        if self.curve(self.last_epoch) == 0:
            # there, whatever somebody has made of the rate
            return self._floors(self.optimizer.param_groups)
        return super().get_lr()

    def _floors(self, groups: Groups) -> list[Number]:
        floors = read(groups, "swa_lr")
        return list(map(copied, floors)) if holds_tensors(floors) else floors

    def _join(self, group: dict[str, Any]) -> None:
        first, share = self._share(group)
        group.setdefault("swa_lr", group["lr"] if first is None else first["swa_lr"] * share)
        super()._join(group)

    def _check_arguments(self, state: Mapping[str, Any]) -> None:
        owner = type(self).__name__
        if "_anneal_strategy" in state:
            require_shape(state["_anneal_strategy"], owner)
        epochs = state.get("anneal_epochs", 0)
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise ValueError(
                f"anneal_epochs must be equal or greater than 0, got {epochs} "
                f"({owner}: anneal_epochs must be a whole number in [0, inf))"
            )
