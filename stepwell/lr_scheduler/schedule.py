"""Schedule: curves on any hyperparameter of any group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch.optim import Optimizer

from ..language.fields import near_miss
from ..language.number import is_number
from .curvelr import moved, start_of, started_at
from .curves import Curve
from .hyperparameters import Number, read, require
from .scheduler import LRScheduler, require_optimizer
from .watch import copied, snapshot


@dataclass(frozen=True)
class absolute:  # noqa: N801
    """A curve whose values are those of the hyperparameter itself, not factors of the initial one.

    Args:
        curve: the values

    >>> from stepwell.lr_scheduler import linear
    >>> absolute(linear(0.85, 0.95, 1000))
    absolute(curve=linear(0.85, 0.95, 1000))
    """

    curve: Curve

    def __post_init__(self) -> None:
        if not isinstance(self.curve, Curve):
            raise TypeError(f"absolute: curve must be a curve, got {self.curve!r}")


Driver = Curve | absolute
Driven = Driver | Sequence[Driver | None] | Mapping[Any, Driver | None] | None


class Schedule(LRScheduler):
    """Curves on hyperparameters: the rate, the momentum, one of the betas, the weight decay ...

    A curve multiplies the value that each group had at the start; one in `absolute` is the value.
    What drives a hyperparameter may be one curve for all groups; a list of one per group, None for
    a group that is left alone; or a dict of them by the group's number, its "name", or that of its
    optimizer in `Combined`. Groups that nothing drives may lack the hyperparameter. A value changed
    by hand is kept, and moved on by the curve's ratios.

    All of it resumes from `last_epoch` alone.

    Args:
        optimizer: whose hyperparameters it sets
        lr: what drives the rate; None leaves it alone
        last_epoch: the last step already taken; -1 starts anew
        hyperparameters: what drives others, by name, such as `weight_decay=cosine(1000)` or
            `**{"betas[0]": absolute(linear(0.85, 0.95, 1000))}`

    Raises:
        ValueError: a group lacks a hyperparameter, a list has the wrong length, or a dict names a
            group that is not there; nothing is changed
        TypeError: it is no number, or what drives it is no curve, or nothing drives anything

    >>> from stepwell.lr_scheduler import cosine, warmup
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.5)
    >>> schedule = Schedule(optimizer, lr=warmup(1) >> cosine(2), weight_decay=cosine(2))
    >>> schedule.preview(4)
    [[0.5], [1.0], [0.5], [0.0]]
    """

    unsaved = LRScheduler.unsaved | {"drivers"}

    # the second is for `**{"betas[0]": curve}`, which type checkers try on last_epoch too
    @overload
    def __init__(
        self,
        optimizer: Optimizer,
        lr: Driven = None,
        *,
        last_epoch: int = -1,
        **hyperparameters: Any,
    ) -> None: ...

    @overload
    def __init__(self, optimizer: Optimizer, lr: Driven = None, **hyperparameters: Any) -> None: ...

    def __init__(
        self,
        optimizer: Optimizer,
        lr: Driven = None,
        *,
        last_epoch: int = -1,
        **hyperparameters: Any,
    ) -> None:
        owner = type(self).__name__
        require_optimizer(optimizer, owner)
        given = {"lr": lr, **hyperparameters}
        self.drivers = {
            name: snapshot(driver) for name, driver in given.items() if driver is not None
        }
        for name, driver in self.drivers.items():
            _check_driver(driver, optimizer.param_groups, f"{owner}: {name}")
            require(optimizer.param_groups, name, owner, self._driven(optimizer, name))
        if not any(self._driven(optimizer, name) for name in self.drivers):
            raise TypeError(
                f"{owner}: give it a curve for at least one hyperparameter, such as "
                "lr=warmup(500) >> cosine(9500)"
            )
        super().__init__(optimizer, last_epoch)

    def _driven(self, optimizer: Optimizer, name: str) -> list[int]:
        groups = enumerate(optimizer.param_groups)
        return [i for i, group in groups if _driver_of(self.drivers[name], i, group) is not None]

    def _names(self) -> tuple[str, ...]:
        return tuple(self.drivers)

    def _take_base_rates(self) -> None:
        super()._take_base_rates()
        self.initial_values = {
            name: [_initial(group, name) for group in self.optimizer.param_groups]
            for name in self.drivers
        }

    def _join(self, group: dict[str, Any]) -> None:
        super()._join(group)
        for name, values in self.initial_values.items():
            self.initial_values[name] = [*values, _initial(group, name)]

    def _initial_of(self, group: dict[str, Any]) -> Number:
        groups = self.optimizer.param_groups
        index = [id(other) for other in groups].index(id(group))
        driver = _driver_of(self.drivers.get("lr"), index, group)
        if not isinstance(driver, Curve):
            return super()._initial_of(group)
        others = read(groups[: len(self.base_lrs)], "lr")
        return started_at(group["lr"], 0.0, driver(max(self.last_epoch, 0)), others)

    def get_lr(self) -> list[Number]:
        """The rates of the groups at `last_epoch`; for the latest ones call `get_last_lr`."""
        self._warn_outside_of_step()
        held = read(self.optimizer.param_groups, "lr")
        return self._next_values().get("lr", [copied(rate) for rate in held])

    def _next_values(self) -> dict[str, list[Number]]:
        step = self.last_epoch
        move = start_of(self.optimizer) if self._is_initial and step > 0 else moved
        values = {}
        for name, initial in self.initial_values.items():
            values[name] = held = read(self.optimizer.param_groups, name)
            for driver, members in self._members(name):
                bases = [initial[i] for i in members]
                if isinstance(driver, absolute):
                    new: list[Number] = [driver.curve(step)] * len(members)
                else:
                    before = driver(step - 1) if step > 0 else 1.0
                    new = move([held[i] for i in members], bases, None, before, driver(step))
                for index, value in zip(members, new, strict=True):
                    held[index] = value
        return values

    def _closed_values(self) -> dict[str, list[Number]]:
        return self._values_at(self.last_epoch)

    def _values_at(self, step: int) -> dict[str, list[Number]]:
        values = {}
        for name, initial in self.initial_values.items():
            values[name] = closed = list(initial)
            for driver, members in self._members(name):
                is_value = isinstance(driver, absolute)
                value = driver.curve(step) if isinstance(driver, absolute) else driver(step)
                for index in members:
                    closed[index] = value if is_value else initial[index] * value
        return values

    def _check_arguments(self, state: Mapping[str, Any]) -> None:
        super()._check_arguments(state)
        values = state.get("initial_values", {})
        lists = values.values() if isinstance(values, Mapping) else ()
        if not all(
            isinstance(each, (list, tuple)) and all(map(_is_initial, each)) for each in lists
        ):
            raise TypeError(
                f"{type(self).__name__}: the state's 'initial_values' must be a dict of lists of "
                f"numbers, got {values!r}"
            )

    def _take_state(self, state: dict[str, Any]) -> None:
        given = state.pop("initial_values", {})
        super()._take_state(state)
        # what was not driven when it was saved starts from what the groups had here
        own = self.initial_values
        self.initial_values = {name: given.get(name, values) for name, values in own.items()}

    def curves(self, name: str) -> list[Curve]:
        """Return the curves that drive a hyperparameter, each of them once."""
        drivers = [driver for driver, _ in self._members(name)] if name in self.drivers else []
        return [one.curve if isinstance(one, absolute) else one for one in drivers]

    def _members(self, name: str) -> Iterator[tuple[Driver, list[int]]]:
        """The groups that each curve drives."""
        found: dict[Driver, list[int]] = {}
        for index, group in enumerate(self.optimizer.param_groups):
            driver = _driver_of(self.drivers[name], index, group)
            # one that has joined may lack what one curve drives in all groups
            if driver is not None and self.initial_values[name][index] is not None:
                found.setdefault(driver, []).append(index)
        yield from found.items()


def _driver_of(drivers: Any, index: int, group: Mapping[str, Any]) -> Driver | None:
    """What drives a hyperparameter of a group, if anything does."""
    if isinstance(drivers, Mapping):
        key = index if index in drivers else group.get("name")
        found: Driver | None = drivers.get(key if key in drivers else group.get("optimizer"))
        return found
    if isinstance(drivers, Sequence):
        return drivers[index] if index < len(drivers) else None
    driver: Driver = drivers
    return driver


def _names_of(group: Mapping[str, Any]) -> list[str]:
    """The names of a group: its own, and that of its optimizer in `Combined`."""
    given = (group.get("name"), group.get("optimizer"))
    return [name for name in given if isinstance(name, str)]


def _check_driver(driver: Any, groups: Sequence[Mapping[str, Any]], place: str) -> None:
    if isinstance(driver, Mapping):
        _check_names(driver, groups, place)
        curves = list(driver.values())
    elif isinstance(driver, Sequence) and not isinstance(driver, str):
        if len(driver) != len(groups):
            raise ValueError(f"{place}: got {len(driver)} curves for {len(groups)} groups")
        curves = list(driver)
    else:
        curves = [driver]
    for curve in curves:
        if not isinstance(curve, (Curve, absolute, type(None))):
            hint = f" (for text: parse({curve!r}))" if isinstance(curve, str) else ""
            raise TypeError(
                f"{place} must be a curve such as warmup(500) >> cosine(9500), or a list or dict "
                f"of curves, got {curve!r}{hint}"
            )


def _check_names(
    drivers: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]], place: str
) -> None:
    names = list(dict.fromkeys(name for group in groups for name in _names_of(group)))
    for key in drivers:
        if key in names or (isinstance(key, int) and 0 <= key < len(groups)):
            continue
        close = near_miss(key, names) if isinstance(key, str) else None
        known = ", ".join(map(repr, [*range(len(groups)), *names]))
        hint = f"did you mean {close!r}?" if close else f"there are {known}"
        raise ValueError(f"{place}: there is no group {key!r}; {hint}")


def _is_initial(value: Any) -> bool:
    return value is None or is_number(value)


def _initial(group: dict[str, Any], name: str) -> Any:
    """What the group had at the start; it is kept in the group, and so saved with the optimizer."""
    [held] = read([group], name)
    if held is None:
        return None
    return copied(group.setdefault(f"initial_{name}", copied(held)))
