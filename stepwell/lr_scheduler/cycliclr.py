"""CyclicLR: the rate goes up and down between two bounds, the momentum the other way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch.optim import Optimizer

from ..language.fields import Field, Range
from .curvelr import along
from .curves import cyclic
from .curves.cyclic import MODES, scale
from .functions import attributes_of, require_object
from .hyperparameters import Number, write
from .momentum import MomentumCycle
from .scheduler import per_group, require_optimizer
from .watch import copied

RATES = tuple(Field(name, None, "number", Range(0)) for name in ("base_lr", "max_lr"))
SIZES = (
    Field("step_size_up", 2000, "number", Range(0, open="(")),
    Field("step_size_down", None, "number", Range(0), optional=True),
)
MOMENTA = (
    Field("base_momentum", 0.8, "number"),
    Field("max_momentum", 0.9, "number"),
)
SHARES = (
    Field("total_size", None, "number", Range(0, open="(")),
    Field("step_ratio", None, "number", Range(0, 1, open="(")),
    Field("scale_mode", None, "choice", choices=("cycle", "iterations")),
)
MODE = Field("mode", None, "choice", choices=MODES)
GAMMA = Field("gamma", 1.0, "number", Range(0))


class CyclicLR(MomentumCycle):
    """Leads the rate of every group from `base_lr` to `max_lr` and back, again and again.

        rate(t) = base_lr + (max_lr - base_lr) height(t) scale_fn(x)

    `height` is that of the curve `cyclic`, from 0 to 1 and back in each cycle; x is the number of
    the cycle, the first being 1, or the step, as `scale_mode` says.

    Paper: Smith, Cyclical Learning Rates for Training Neural Networks, arXiv:1506.01186.

    Args:
        optimizer: whose rates it sets
        base_lr: the lowest rate, or a list of one per group
        max_lr: the highest rate, or a list of one per group
        step_size_up: how many steps the way up takes
        step_size_down: how many steps the way down takes; None: as many
        mode: "triangular"; "triangular2" halves the height with each cycle; in "exp_range" it
            is gamma ^ t
        gamma: for "exp_range"
        scale_fn: a function to use instead of a mode
        scale_mode: what `scale_fn` is given, the number of the "cycle" or the "iterations"
        cycle_momentum: set the momentum too, or the first of the betas
        base_momentum: the lowest momentum, or a list of one per group
        max_momentum: the highest momentum, or a list of one per group
        last_epoch: the last step already taken; -1 starts anew

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    >>> CyclicLR(optimizer, base_lr=0.5, max_lr=1.0, step_size_up=2).preview(5)
    [[0.5], [0.75], [1.0], [0.75], [0.5]]
    """

    unsaved = MomentumCycle.unsaved | {"_scale_fn_custom", "_given_count"}

    def __init__(
        self,
        optimizer: Optimizer,
        base_lr: float | list[float],
        max_lr: float | list[float],
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
        gamma: float = 1.0,
        scale_fn: Callable[[float], float] | None = None,
        scale_mode: Literal["cycle", "iterations"] = "cycle",
        cycle_momentum: bool = True,
        base_momentum: float = 0.8,
        max_momentum: float = 0.9,
        last_epoch: int = -1,
    ) -> None:
        owner = type(self).__name__
        require_optimizer(optimizer, owner)
        self.optimizer = optimizer

        def checked(field: Field, value: Any) -> list[Any]:
            values = per_group(value, optimizer, field.name, owner)
            return [field.check(number, owner) for number in values]

        self.base_lrs, self.max_lrs = map(checked, RATES, (base_lr, max_lr))
        self._given_count = len(self.base_lrs)
        self._take_sizes(step_size_up, step_size_down)
        if mode not in MODES and scale_fn is None:
            raise ValueError(
                f"mode is invalid and scale_fn is None ({owner}: mode must be one of "
                f"{', '.join(map(repr, MODES))}, got {mode!r})"
            )
        self.mode = mode
        self.gamma = GAMMA.check(gamma, owner)
        self._scale_fn_custom = scale_fn
        self.scale_mode = scale_mode
        if scale_fn is None:
            self.scale_mode = "iterations" if mode == "exp_range" else "cycle"
        self.cycle_momentum = cycle_momentum
        if cycle_momentum:
            self._find_momentum()
            momenta = map(self._momenta, MOMENTA, (base_momentum, max_momentum))
            self.base_momentums, self.max_momentums = momenta
        super().__init__(optimizer, last_epoch)

    def _take_sizes(self, up: float, down: float | None) -> None:
        for field, value in zip(SIZES, (up, down), strict=True):
            field.check(value, type(self).__name__)
        self.total_size = float(up) + float(up if down is None else down)
        self.step_ratio = float(up) / self.total_size

    def _prepare_groups(self) -> None:
        groups = self.optimizer.param_groups
        values = {"lr": self.base_lrs}
        if self.cycle_momentum:
            values[self._names()[1]] = self.max_momentums
        write(groups, values)
        if self.cycle_momentum:
            for index, group in enumerate(groups):
                group["max_momentum"] = copied(self.max_momentums[index])
                group["base_momentum"] = copied(self.base_momentums[index])

    def scale_fn(self, x: float) -> float:
        """How high the peak of a cycle is, given its number or the step."""
        if self._scale_fn_custom is not None:
            return self._scale_fn_custom(x)
        return scale(self.mode, self.gamma, x)

    def _values_at(self, step: int) -> dict[str, list[Number]]:
        up = self.total_size * self.step_ratio
        curve = cyclic(up, self.total_size - up)
        counted = step if self.scale_mode == "iterations" else curve.cycle(step)
        height = curve.height(step) * self.scale_fn(counted)
        values = {"lr": along(self.max_lrs, self.base_lrs, height)}
        if self.cycle_momentum:
            values[self._names()[1]] = along(self.base_momentums, self.max_momentums, height)
        return values

    def _take_base_rates(self) -> None:
        given, groups = self.base_lrs, self.optimizer.param_groups
        super()._take_base_rates()
        # those of groups that have joined are in the groups
        kept = min(self._given_count, len(groups))
        self.base_lrs, self.max_lrs = given[:kept], self.max_lrs[:kept]
        if self.cycle_momentum:
            self.base_momentums = self.base_momentums[:kept]
            self.max_momentums = self.max_momentums[:kept]
        for group in groups[kept:]:
            self._join(group)

    def _join(self, group: dict[str, Any]) -> None:
        first, share = self._share(group)
        lowest: Number = 0.0
        highest: Number = group["lr"]
        if first is not None:
            index = [id(other) for other in self.optimizer.param_groups].index(id(first))
            lowest, highest = self.base_lrs[index] * share, self.max_lrs[index] * share
        group.setdefault("initial_lr", copied(lowest or highest))
        self.base_lrs = [*self.base_lrs, lowest]
        self.max_lrs = [*self.max_lrs, copied(highest)]
        if self.cycle_momentum:
            self.base_momentums = [*self.base_momentums, copied(self.base_momentums[0])]
            self.max_momentums = [*self.max_momentums, copied(self.max_momentums[0])]
            group["max_momentum"] = copied(self.max_momentums[-1])
            group["base_momentum"] = copied(self.base_momentums[-1])

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer and a plain function, in torch's layout."""
        function = self._scale_fn_custom
        saved = None if function is None else attributes_of(function, f"{type(self).__name__}")
        return {**super().state_dict(), "_scale_fn_custom": saved}

    def _check_arguments(self, state: Mapping[str, Any]) -> None:
        # with a function, the mode is any name
        fields = (GAMMA, *SHARES, *((MODE,) if self._scale_fn_custom is None else ()))
        for field in fields:
            if field.name in state:
                field.check(state[field.name], type(self).__name__)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        after = {**vars(self), **state}
        ends = ["base_lrs", "max_lrs"]
        ends += ["base_momentums", "max_momentums"] if after["cycle_momentum"] else []
        counts = {name: len(after.get(name, ())) for name in ends}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ValueError(
                f"{type(self).__name__}: the state must hold as many of each as there are groups, "
                f"got {found}, with cycle_momentum={after['cycle_momentum']}"
            )
        saved = state.get("_scale_fn_custom")
        if not isinstance(saved, Mapping | None):
            raise TypeError(
                f"{type(self).__name__}: the state's '_scale_fn_custom' must be the attributes of "
                f"scale_fn, a dict or None, got {saved!r}"
            )
        if saved:
            require_object(self._scale_fn_custom, "scale_fn", type(self).__name__)

    def _take_state(self, state: dict[str, Any]) -> None:
        attributes = state.pop("_scale_fn_custom", None)
        super()._take_state(state)
        if attributes:
            vars(self._scale_fn_custom).update(attributes)
