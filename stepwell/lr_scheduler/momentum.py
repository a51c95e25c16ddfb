"""What OneCycleLR and CyclicLR share: they set the momentum too, or the first of the betas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from ..language.fields import Field, Range
from .hyperparameters import Number, check
from .scheduler import LRScheduler, per_group


class MomentumCycle(LRScheduler):
    """A schedule whose values are a function of the step alone, by `_values_at`."""

    cycle_momentum: bool
    use_beta1: bool
    # what it needs in the groups for that
    momentum_keys: ClassVar[tuple[str, ...]] = ()

    def _find_momentum(self) -> None:
        """Say by `use_beta1` which hyperparameter is cycled against the rate.

        Raises:
            ValueError: the optimizer has neither
        """
        groups, owner = self.optimizer.param_groups, type(self.optimizer).__name__
        self.use_beta1 = all("betas" in group for group in groups)
        if not self.use_beta1 and not all("momentum" in group for group in groups):
            is_mixed = any("betas" in group or "momentum" in group for group in groups)
            lacks = "the groups have neither in common" if is_mixed else f"{owner} has neither"
            raise ValueError(
                "optimizer must support momentum or beta1 with `cycle_momentum` option enabled "
                f"({type(self).__name__}: {lacks}; pass cycle_momentum=False)"
            )

    def _momenta(self, field: Field, given: Any) -> list[Number]:
        """One end of the cycle for each group, checked as the optimizer itself would.

        Raises:
            ValueError, TypeError: a number is out of range, or a list has another length
        """
        owner, groups = type(self).__name__, self.optimizer.param_groups
        # a momentum may be above 1, as far as SGD is concerned
        field = replace(field, range=Range(0, 1) if self.use_beta1 else Range(0))
        values = per_group(given, self.optimizer, field.name, owner)
        values = [field.check(number, owner) for number in values]
        try:
            check(groups, "betas[0]" if self.use_beta1 else "momentum", values)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{error} ({owner}: {field.name} leads there)") from None
        return values

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

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        after = {**vars(self), **state}
        if not after["cycle_momentum"]:
            return
        key = "betas" if after.get("use_beta1") else "momentum"
        for index, group in enumerate(self.optimizer.param_groups):
            # one that joins is given them at the next step
            needs = (key, *self.momentum_keys) if index == 0 else (key,)
            lacks = [name for name in needs if name not in group]
            if lacks:
                raise ValueError(
                    f"{type(self).__name__}: the state's 'use_beta1' and 'cycle_momentum' say that "
                    f"{key} is cycled, but group {index} has no {' and no '.join(lacks)}; make the "
                    "schedule, and its optimizer, as those that were saved"
                )
