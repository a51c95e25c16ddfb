"""OneCycleLR: the rate rises once and falls to almost nothing, the momentum goes the other way."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.optim import Optimizer

from ..language.fields import Field, Range, plain_number
from ..language.number import is_number
from .curvelr import along
from .curves.one_cycle import SHAPES, ends, phase
from .hyperparameters import Number, read, write
from .momentum import MomentumCycle
from .scheduler import per_group, require_optimizer, require_positive_integer, require_shape
from .watch import copied, level_of_caller

RATE = Field("max_lr", None, "number", Range(0))
FIELDS = (
    Field("base_momentum", 0.85, "number"),
    Field("max_momentum", 0.95, "number"),
    Field("div_factor", 25.0, "number", Range(0, open="(")),
    Field("final_div_factor", 1e4, "number", Range(0, open="(")),
)
# each phase: the keys of a group between which its rate and its momentum go
WAYS = (
    ("initial_lr", "max_lr", "max_momentum", "base_momentum"),
    ("max_lr", "initial_lr", "base_momentum", "max_momentum"),
    ("initial_lr", "min_lr", "max_momentum", "max_momentum"),
)
LAST_OF_TWO = ("max_lr", "min_lr", "base_momentum", "max_momentum")
RATES = ("initial_lr", "max_lr", "min_lr")
MOMENTA = ("max_momentum", "base_momentum")


class OneCycleLR(MomentumCycle):
    """Leads the rate up to `max_lr` and down to almost nothing, the momentum down and up.

    The rate starts at max_lr / div_factor, and ends at that / final_div_factor. The phases are
    those of the curve `one_cycle`; the rates and momenta between which they lead are in the groups,
    as "initial_lr", "max_lr", "min_lr", "max_momentum" and "base_momentum".

    Paper: Smith and Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large
    Learning Rates, arXiv:1708.07120.

    Args:
        optimizer: whose rates it sets
        max_lr: the highest rate, or a list of one per group
        total_steps: how many steps the cycle takes
        epochs: with `steps_per_epoch`, another way to say how many
        steps_per_epoch: with `epochs`
        pct_start: the share of the steps that the way up takes
        anneal_strategy: the form of the lines, "cos" or "linear"
        cycle_momentum: set the momentum too, or the first of the betas
        base_momentum: the lowest momentum, or a list of one per group
        max_momentum: the highest momentum, or a list of one per group
        div_factor: max_lr / first rate
        final_div_factor: first rate / last rate
        three_phase: go down to the first rate first, and to the last then
        last_epoch: the last step already taken; -1 starts anew

    Raises:
        ValueError: by `step`, after `total_steps`; nothing is changed

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    >>> scheduler = OneCycleLR(optimizer, max_lr=1.0, total_steps=10, pct_start=0.5)
    >>> [round(rate, 3) for rate, in scheduler.preview(10)]
    [0.04, 0.181, 0.52, 0.859, 1.0, 0.905, 0.655, 0.345, 0.095, 0.0]
    """

    momentum_keys = MOMENTA
    kept_in_groups = (*RATES, *MOMENTA)

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | list[float],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | list[float] = 0.85,
        max_momentum: float | list[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        owner = type(self).__name__
        require_optimizer(optimizer, owner)
        self.optimizer = optimizer
        self.total_steps = _total_steps(total_steps, epochs, steps_per_epoch, owner)
        pct_start = plain_number(pct_start)
        _check_form(pct_start, anneal_strategy, owner)
        self._schedule_phases = _phases(self.total_steps, pct_start, three_phase)
        self._anneal_func_type = anneal_strategy
        self.cycle_momentum = cycle_momentum
        highest = per_group(max_lr, optimizer, "max_lr", owner)
        factors = zip(FIELDS[2:], (div_factor, final_div_factor), strict=True)
        div_factor, final_div_factor = (field.check(value, owner) for field, value in factors)
        firsts = [RATE.check(rate, owner) / div_factor for rate in highest]
        lasts = [first / final_div_factor for first in firsts]
        self._given = {"initial_lr": firsts, "max_lr": highest, "min_lr": lasts}
        if cycle_momentum:
            self._find_momentum()
            for field, momentum in zip(FIELDS, (base_momentum, max_momentum), strict=False):
                self._given[field.name] = self._momenta(field, momentum)
        super().__init__(optimizer, last_epoch)
        del self._given

    def _prepare_groups(self) -> None:
        groups = self.optimizer.param_groups
        if self.cycle_momentum:
            write(groups, {self._names()[1]: self._given["max_momentum"]})
        for key, values in self._given.items():
            for group, value in zip(groups, values, strict=True):
                group[key] = copied(value)

    def _values_at(self, step: int) -> dict[str, list[Number]]:
        _check_end(step, self.total_steps, type(self).__name__)
        index, over = phase([known["end_step"] for known in self._schedule_phases], step)
        share = SHAPES[self._anneal_func_type](over)
        way, groups = self._schedule_phases[index], self.optimizer.param_groups
        values = {}
        for name, quantity in zip(self._names(), ("lr", "momentum"), strict=False):
            starts, ends = (read(groups, way[f"{side}_{quantity}"]) for side in ("start", "end"))
            values[name] = _between(starts, ends, share)
        return values

    def _join(self, group: dict[str, Any]) -> None:
        first, share = self._share(group)
        for key in RATES:
            group.setdefault(key, copied(group["lr"] if first is None else first[key] * share))
        for key in MOMENTA if self.cycle_momentum else ():
            group.setdefault(key, copied(self.optimizer.param_groups[0][key]))
        super()._join(group)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        after = {**vars(self), **state}
        owner = f"{type(self).__name__}, by the state's last_epoch"
        _check_end(after["last_epoch"], after["total_steps"], owner)

    def _check_arguments(self, state: Mapping[str, Any]) -> None:
        owner = type(self).__name__
        if "total_steps" in state:
            require_positive_integer("total_steps", state["total_steps"], owner)
        if "_anneal_func_type" in state:
            require_shape(state["_anneal_func_type"], owner)
        phases = state.get("_schedule_phases", self._schedule_phases)
        is_list = isinstance(phases, (list, tuple)) and len(phases) in (2, 3)
        if not is_list or not all(map(_is_phase, phases)):
            raise TypeError(
                f"{owner}: the state's '_schedule_phases' must be two or three dicts with "
                f"an 'end_step' and the keys of groups between which they lead, got {phases!r}"
            )

    def _take_state(self, state: dict[str, Any]) -> None:
        given, total = self.total_steps, state.get("total_steps", self.total_steps)
        if given > total:
            warnings.warn(
                f"{type(self).__name__}: total_steps is {total} in the state that is loaded, and "
                f"{given} in the constructor. The saved value is used, so step {total + 1} is "
                f"rejected; to go on for longer, set state_dict['total_steps'] = {given} before it "
                "is loaded",
                UserWarning,
                stacklevel=level_of_caller(),
            )
        phases = state.get("_schedule_phases", self._schedule_phases)
        before = phases[-1]["end_step"] + 1
        if "total_steps" in state and total != before:
            # changed by hand, to make the cycle longer or shorter: each phase keeps its share
            rise = (phases[0]["end_step"] + 1) / before
            steps = ends(total, rise, len(phases) > 2)
            state["_schedule_phases"] = [
                {**phase, "end_step": end} for phase, end in zip(phases, steps, strict=True)
            ]
        super()._take_state(state)


def _check_end(step: int, total: int, owner: str) -> None:
    if step > total:
        raise ValueError(
            f"Tried to step {step} times. The specified number of total steps is {total} "
            f"({owner}: make total_steps larger, or stop)"
        )


def _total_steps(total: Any, epochs: Any, per_epoch: Any, owner: str) -> int:
    if total is not None:
        return require_positive_integer("total_steps", total, owner)
    if epochs is None or per_epoch is None:
        raise ValueError(
            f"You must define either total_steps OR (epochs AND steps_per_epoch) ({owner})"
        )
    count = require_positive_integer("epochs", epochs, owner)
    return count * require_positive_integer("steps_per_epoch", per_epoch, owner)


def _check_form(pct_start: Any, anneal_strategy: Any, owner: str) -> None:
    if not isinstance(pct_start, float) or not 0 <= pct_start <= 1:
        raise ValueError(
            f"Expected float between 0 and 1 pct_start, but got {pct_start} "
            f"({owner}: pct_start must be a number in [0, 1])"
        )
    require_shape(anneal_strategy, owner)


def _phases(total_steps: int, pct_start: float, three_phase: bool) -> list[dict[str, Any]]:
    """The phases as torch keeps them, and saves them."""
    ways: Sequence[tuple[str, ...]] = WAYS if three_phase else (WAYS[0], LAST_OF_TWO)
    names = ("start_lr", "end_lr", "start_momentum", "end_momentum")
    return [
        {"end_step": end, **dict(zip(names, way, strict=True))}
        for end, way in zip(ends(total_steps, pct_start, three_phase), ways, strict=True)
    ]


def _is_phase(phase: Any) -> bool:
    """Return whether this is a phase as `_phases` makes it."""
    if not isinstance(phase, Mapping) or not is_number(phase.get("end_step")):
        return False
    ways = ("start_lr", "end_lr", "start_momentum", "end_momentum")
    return all(phase.get(way) in (*RATES, *MOMENTA) for way in ways)


def _between(starts: list[Number], ends: list[Number], share: float) -> list[Number]:
    """A share of the way for each group; computed once where it is the same for all of them."""
    count = len(starts)
    is_plain = type(starts[0]) is float and type(ends[0]) is float
    if is_plain and starts.count(starts[0]) == ends.count(ends[0]) == count:
        return along(ends[:1], starts[:1], share) * count
    return along(ends, starts, share)
