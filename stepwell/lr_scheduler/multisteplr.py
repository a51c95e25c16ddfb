"""MultiStepLR: the rate falls by a constant factor at given steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from .curvelr import CurveLR, remade
from .curves import Curve, multi_step
from .curves.composition import whole
from .curves.multi_step import MILESTONE, ascending


class MultiStepLR(CurveLR):
    """Multiplies the rate of every group by `gamma` at each of the milestones.

        rate(t) = initial rate * gamma ^ (number of milestones <= t)

    Args:
        optimizer: whose rates it sets
        milestones: steps in ascending order; one that stands there twice counts twice
        gamma: what the rate is multiplied by at each of them
        last_epoch: the last step already taken; -1 starts anew

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> scheduler = MultiStepLR(torch.optim.SGD([weight], lr=0.5), milestones=[1, 3], gamma=0.5)
    >>> scheduler.preview(5)
    [[0.5], [0.25], [0.25], [0.125], [0.125]]
    """

    fields = multi_step.checks
    free_in_state = CurveLR.free_in_state | {"milestones"}

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Iterable[int],
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        self.milestones = Counter(ascending(milestones, type(self).__name__))
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    @property
    def curve(self) -> Curve:
        """The curve of its present arguments."""
        return remade(multi_step, tuple(sorted(self.milestones.elements())), self.gamma)

    def _check_arguments(self, state: Mapping[str, Any]) -> None:
        super()._check_arguments(state)
        if "milestones" in state:
            _counted(state["milestones"], type(self).__name__)

    def _take_state(self, state: dict[str, Any]) -> None:
        if "milestones" in state:
            state["milestones"] = _counted(state["milestones"], type(self).__name__)
        super()._take_state(state)


def _counted(saved: Any, owner: str) -> Counter[int]:
    """The milestones of a state: a Counter, as torch saves them, or a list of them.

    Raises:
        TypeError, ValueError: they are neither
    """
    if not isinstance(saved, Mapping):
        return Counter(ascending(saved, owner))
    for number in (*saved.keys(), *saved.values()):
        MILESTONE.check(whole(number), owner)
    return Counter(saved)
