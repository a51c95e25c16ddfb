"""The stateful shell that every schedule shares, to torch's contract.

What has to be remembered, saved, restored, warned about or written into the optimizer is said
here, once. A rate that was loaded wins over what a constructor has written, in whatever order the
optimizer and its schedules are made and loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

from torch.optim import Optimizer
from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING
from torch.optim.lr_scheduler import LRScheduler as TorchLRScheduler

from ..compiling import skipped
from ..language.fields import Field, Range, plain_number
from .hyperparameters import Floats, Groups, Number, are_plain, holds, read, write
from .stored import as_state, check_kinds, declared_attributes
from .watch import check_order, copied, loads, look, meant_values, move_on, settle, snapshot, watch

LAST_EPOCH = Field("last_epoch", -1, "integer", Range(-1))
GET_LR = "To get the last learning rate computed by the scheduler, please use `get_last_lr()`."


class LRScheduler(TorchLRScheduler):
    """Base class of all schedules: an optimizer, a step count and the rates it writes.

    A subclass says in `get_lr` what the rates of the groups are once `last_epoch` has moved on;
    one whose rate is a function of the step derives from `CurveLR` instead.

    Attributes:
        optimizer: whose rates it sets
        base_lrs: the rate that each group started with
        last_epoch: the step the rates stand at; 0 after construction

    Raises:
        TypeError: `optimizer` is no optimizer
        ValueError: `last_epoch` is below -1
        KeyError: `last_epoch` resumes a schedule, but a group does not know its `initial_lr`
    """

    unsaved: ClassVar[frozenset[str]] = frozenset({"optimizer", "_loads_seen", "_written"})
    # entries of the state that need not be of the kind that is there
    free_in_state: ClassVar[frozenset[str]] = frozenset({"optimizer"})
    # arguments that its constructor writes into the groups, with which they are saved and loaded
    kept_in_groups: ClassVar[tuple[str, ...]] = ()

    _written: list[Number] | None = None

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        owner = type(self).__name__
        vars(self).update({name: copied(value) for name, value in vars(self).items()})
        self._check_arguments(vars(self))
        require_optimizer(optimizer, owner)
        LAST_EPOCH.check(last_epoch, owner)
        last_epoch = copied(last_epoch)
        if last_epoch >= 0:
            _require_initial_rates(optimizer, owner)
        watch(optimizer)
        self.optimizer = optimizer
        self.last_epoch = last_epoch
        if last_epoch == -1:
            self._prepare_groups()
        self._take_base_rates()
        self._initial_step()
        settle(optimizer)

    # What a subclass says

    def get_lr(self) -> list[Number]:
        """The rates of the groups at `last_epoch`; for the latest ones call `get_last_lr`."""
        raise NotImplementedError

    def _names(self) -> tuple[str, ...]:
        """The hyperparameters it sets."""
        return ("lr",)

    def _prepare_groups(self) -> None:
        """Write into the groups what a schedule that starts anew needs there."""

    def _next_values(self) -> dict[str, list[Number]]:
        """What the groups hold of each hyperparameter once `last_epoch` has moved on by one."""
        return {"lr": self.get_lr()}

    def _values_at(self, step: int) -> dict[str, list[Number]]:
        """What untouched groups hold at a step; here by taking all steps from the first anew."""
        double, stage = self._double()
        write(stage.param_groups, {"lr": self._initial_rates()})
        double._start_anew()
        for _ in range(step):
            double.step()
        return {name: read(stage.param_groups, name) for name in self._names()}

    def _check_arguments(self, state: Mapping[str, Any]) -> None:
        """Raise what the constructor would raise for these attributes."""

    # Steps

    def get_last_lr(self) -> list[Number]:
        """The rates that the latest `step` wrote, one per group; Tensors are copies."""
        return self._last_lr

    @skipped
    def step(self, epoch: int | None = None) -> None:
        """Move on by one step, after the optimizer's own `step`.

        Args:
            epoch: deprecated; go to this step and set the rates by the closed form

        Raises:
            ValueError: a rate is out of range, or `epoch` negative; nothing is changed
        """
        if self._step_count == 1 and not self._is_initial:
            check_order(self.optimizer)
        if epoch is not None:
            warnings.warn(EPOCH_DEPRECATION_WARNING, UserWarning, stacklevel=2)
        self._step_count += 1
        try:
            self._update_lr(epoch)
        except BaseException:
            self._step_count -= 1
            raise

    def _initial_step(self) -> None:
        self._step_count = 0
        self._is_initial = True
        try:
            self.step()
        finally:
            self._is_initial = False

    def _start_anew(self) -> None:
        self.last_epoch = -1
        self._initial_step()

    def _update_lr(self, epoch: int | None = None) -> None:
        if epoch is not None:
            epoch = require_epoch(epoch, type(self).__name__)
        groups = self._follow_groups()
        before = self.last_epoch
        self.last_epoch = before + 1 if epoch is None else epoch
        self._get_lr_called_within_step = True
        try:
            self._write(self._next_values() if epoch is None else self._closed_values(), groups)
        except BaseException:
            self.last_epoch = before
            raise
        finally:
            self._get_lr_called_within_step = False
        if not self._is_initial:
            move_on(self.optimizer)

    def _closed_values(self) -> dict[str, list[Number]]:
        # a user's own schedule may have torch's method
        closed = getattr(self, "_get_closed_form_lr", None)
        return self._next_values() if closed is None else {"lr": closed()}

    def _write(self, values: Mapping[str, Sequence[Number]], groups: Groups) -> None:
        try:
            written = write(groups, values).get("lr")
        except (ValueError, TypeError) as error:
            place = f"{type(self).__name__} leads there at step {self.last_epoch}"
            raise type(error)(f"{error} ({place})") from None
        if type(written) is Floats:
            # by the closed form: the next step need not look at each of them
            self._last_lr = self._written = list(written)
        elif written and are_plain(written):
            self._last_lr = list(written)
        else:
            self._last_lr = self._rates_now()

    def _rates_now(self) -> list[Number]:
        rates = read(self.optimizer.param_groups, "lr")
        return rates if are_plain(rates) else list(map(copied, rates))

    def _warn_outside_of_step(self) -> None:
        if not self._get_lr_called_within_step:
            warnings.warn(GET_LR, UserWarning, stacklevel=3)

    # Groups that come and go

    def _take_base_rates(self) -> None:
        self.base_lrs = [_initial_rate(group) for group in self.optimizer.param_groups]
        self._loads_seen: int | None = loads(self.optimizer)

    def _initial_rates(self) -> list[Number]:
        return self.base_lrs

    def _follow_groups(self) -> Groups:
        """Take in groups that joined, left, or were loaded since the latest step; return all."""
        groups = self.optimizer.param_groups
        known = len(self.base_lrs)
        if len(groups) > known:
            for group in groups[known:]:
                self._join(group)
        if len(groups) < known or self._loads_seen not in (None, loads(self.optimizer)):
            self._take_base_rates()
        return groups

    def _join(self, group: dict[str, Any]) -> None:
        """Take in a group, which goes on from its own rate."""
        if "initial_lr" not in group:
            group["initial_lr"] = copied(self._initial_of(group))
        self.base_lrs = [*self.base_lrs, _initial_rate(group)]

    def _initial_of(self, group: dict[str, Any]) -> Number:
        """The initial rate of a group that joins now."""
        rate: Number = group["lr"]
        return rate

    def _share(self, group: dict[str, Any]) -> tuple[dict[str, Any] | None, Number]:
        """A group that was here before one that joins, and the proportion of the two.

        Initial rates say it, if the one that joins knows its own, or else the present ones. Where
        all of them are zero, there is no such group.
        """
        for known, last in zip(self.optimizer.param_groups, self._last_lr, strict=False):
            if "initial_lr" in group and known["initial_lr"]:
                return known, group["initial_lr"] / known["initial_lr"]
            if "initial_lr" not in group and last:
                return known, group["lr"] / last
        return None, 1.0

    # Looking ahead

    def preview(self, steps: int) -> list[list[float]]:
        """The rates of the groups at this step and at those after it, without moving.

        Args:
            steps: how many steps are asked for, this one included

        Returns:
            for each step a list of numbers, one per group
        """
        double, stage = self._double()
        seen = []
        for step in range(steps):
            if step:
                double.step()
            seen.append([float(group["lr"]) for group in stage.param_groups])
        return seen

    def _double(self) -> tuple[LRScheduler, Stage]:
        """A copy that drives copies of the groups, without their parameters."""
        stage = Stage(self.optimizer)
        return deepcopy(self, {id(self.optimizer): stage}), stage

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, in torch's layout."""
        return {k: snapshot(value) for k, value in vars(self).items() if k not in self.unsaved}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` of this class, or of torch's class of this name, returned.

        The rates that belong to it are put into the groups, unless the optimizer's own were loaded,
        or set by the user. A dict that holds `last_epoch` alone is enough: then they are computed.

        Raises:
            ValueError, TypeError: an entry is out of range or of another kind; nothing is changed
        """
        state = snapshot(deepcopy(as_state(state_dict, type(self).__name__)))
        self._check_state(state)
        look(self.optimizer)
        meant = meant_values(self.optimizer)
        self._take_state(state)
        self._restore_rates(state, meant)
        settle(self.optimizer)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if "last_epoch" in state:
            LAST_EPOCH.check(state["last_epoch"], type(self).__name__)
        self._check_arguments(state)
        # what a user's class keeps beside that of the one here may change its kind
        declared = declared_attributes(type(self).__mro__) - self.free_in_state
        known = {key: own for key, own in vars(self).items() if key in declared}
        check_kinds(state, known, type(self).__name__)

    def _take_state(self, state: dict[str, Any]) -> None:
        self._restore_arguments()
        if len(state.get("base_lrs", ())) == len(self.optimizer.param_groups):
            for group, base in zip(self.optimizer.param_groups, state["base_lrs"], strict=True):
                group.setdefault("initial_lr", copied(base))
        # what the state does not say of groups that have joined is taken from them
        self._follow_groups()
        if "last_epoch" in state:
            state.setdefault("_step_count", max(state["last_epoch"], 0) + 1)
        if "base_lrs" in state:
            # they are known now, whatever is loaded into the optimizer
            self._loads_seen = None
        elif self._loads_seen is not None:
            self._take_base_rates()
        vars(self).update(state)

    def _restore_arguments(self) -> None:
        groups = self.optimizer.param_groups
        for group, meant in zip(groups, meant_values(self.optimizer), strict=True):
            group.update({key: copied(meant[key]) for key in self.kept_in_groups if key in meant})

    def _restore_rates(self, state: Mapping[str, Any], meant: Sequence[dict[str, Any]]) -> None:
        """Write what was meant to be in each group, or else what belongs to the state."""
        groups, names = self.optimizer.param_groups, self._names()
        values: dict[str, list[Number]] = {}
        if not all(holds(group, name) for group in meant for name in names):
            values = self._values_of(state)
        for name in names:
            given = values.get(name, [])
            held = list(given if len(given) == len(groups) else read(groups, name))
            values[name] = [
                read([group], name)[0] if holds(group, name) else value
                for group, value in zip(meant, held, strict=True)
            ]
        self._write(values, groups)

    def _values_of(self, state: Mapping[str, Any]) -> dict[str, list[Number]]:
        """Return the values that belong to a state that has just been loaded."""
        names = self._names()
        values = {"lr": state["_last_lr"]} if "_last_lr" in state and "lr" in names else {}
        if not values.keys() >= set(names) and self.last_epoch >= 0:
            values = {**self._values_at(self.last_epoch), **values}
        return values

    def __getstate__(self) -> dict[str, Any]:
        # what is loaded into a copy of the optimizer is not seen
        return {**vars(self), "_loads_seen": None}


# the name by which older code knows it
_LRScheduler = LRScheduler


class Stage:
    """Stands in for an optimizer while a copy of a schedule is asked what it would do."""

    def __init__(self, optimizer: Optimizer) -> None:
        groups = [{**group, "params": []} for group in optimizer.param_groups]
        self.param_groups: list[dict[str, Any]] = deepcopy(groups)
        self.defaults = optimizer.defaults


def require_optimizer(optimizer: Any, owner: str) -> None:
    """Check that this is an optimizer.

    Raises:
        TypeError: it is none
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} is not an Optimizer "
            f"({owner}: optimizer must be one, such as stepwell.AdamW)"
        )


def require_epoch(epoch: Any, owner: str) -> Any:
    """Return the epoch as a number of Python's, if a schedule can go there.

    Raises:
        ValueError: it is negative, or no finite number
    """
    epoch = plain_number(epoch)
    if isinstance(epoch, bool) or not isinstance(epoch, (int, float)) or epoch not in Range(0):
        raise ValueError(
            f"Expected non-negative epoch, but got {epoch} "
            f"({owner}: epoch must be a number in [0, inf))"
        )
    return epoch


def require_positive_integer(name: str, value: Any, owner: str) -> int:
    """Return an argument as a number of Python's.

    Raises:
        ValueError: it is no whole number above zero
    """
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(
            f"Expected positive integer {name}, but got {value} "
            f"({owner}: {name} must be a whole number in [1, inf))"
        )
    return value


def require_shape(anneal_strategy: Any, owner: str) -> None:
    """Check the name of the form of a line.

    Raises:
        ValueError: it is unknown
    """
    if anneal_strategy not in ("cos", "linear"):
        raise ValueError(
            f"anneal_strategy must be one of 'cos' or 'linear', instead got {anneal_strategy} "
            f"({owner})"
        )


def per_group(value: Any, optimizer: Optimizer, name: str, owner: str) -> list[Any]:
    """One value for each group, given one per group in a list, or one for all of them.

    Raises:
        ValueError: the list has another length
    """
    groups = optimizer.param_groups
    if not isinstance(value, (list, tuple)):
        return [copied(value) for _ in groups]
    if len(value) != len(groups):
        raise ValueError(
            f"{name} must have the same length as optimizer.param_groups. {name} has "
            f"{len(value)} values, param_groups has {len(groups)}. ({owner}: give one number for "
            "all groups, or a list of one per group)"
        )
    return [copied(item) for item in value]


def _initial_rate(group: dict[str, Any]) -> Number:
    rate: Number = copied(group.setdefault("initial_lr", copied(group["lr"])))
    return rate


def _require_initial_rates(optimizer: Optimizer, owner: str) -> None:
    for index, group in enumerate(optimizer.param_groups):
        if "initial_lr" not in group:
            raise KeyError(
                f"param 'initial_lr' is not specified in param_groups[{index}] when resuming "
                f"scheduler with last_epoch >= 0.\n({owner}: load the optimizer's state_dict, "
                "which holds it, before making the scheduler, or leave last_epoch=-1)"
            )
