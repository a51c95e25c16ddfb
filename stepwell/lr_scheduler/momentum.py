"""What OneCycleLR and CyclicLR share: they set the momentum too, or the first of the betas."""

from __future__ import annotations

from .hyperparameters import Number
from .scheduler import LRScheduler


class MomentumCycle(LRScheduler):
    """A schedule whose values are a function of the step alone, by `_values_at`."""

    cycle_momentum: bool
    use_beta1: bool

    def _find_momentum(self) -> None:
        """Say by `use_beta1` which hyperparameter is cycled against the rate.

        Raises:
            ValueError: the optimizer has neither
        """
        defaults = self.optimizer.defaults
        if "momentum" not in defaults and "betas" not in defaults:
            raise ValueError(
                "optimizer must support momentum or beta1 with `cycle_momentum` option enabled "
                f"({type(self).__name__}: {type(self.optimizer).__name__} has neither; pass "
                "cycle_momentum=False)"
            )
        self.use_beta1 = "betas" in defaults

    def _names(self) -> tuple[str, ...]:
        if not self.cycle_momentum:
            return ("lr",)
        return ("lr", "betas[0]" if self.use_beta1 else "momentum")

    def get_lr(self) -> list[Number]:
        """The rates of the groups at `last_epoch`; for the latest ones call `get_last_lr`."""
        self._warn_outside_of_step()
        return self._values_at(self.last_epoch)["lr"]

    def _next_values(self) -> dict[str, list[Number]]:
        return self._values_at(self.last_epoch)

    def _closed_values(self) -> dict[str, list[Number]]:
        return self._values_at(self.last_epoch)
