"""Persistence: what of an optimizer outlives it - state dicts, copies and pickles."""

from __future__ import annotations

import math
import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .compiling import ParamGroups, outside_graphs
from .declaration import Declaration
from .held_groups import checked_group
from .hooks import KINDS, Hooks
from .hyperparameters import Checked
from .language import Formula, program_for
from .matching import EXECUTION, LoadReport, match, refusal
from .rehearsal import Made
from .state_dict import Layout, Loading, Policy, load_group, load_state, pack, read

__all__ = ["Persistence"]

StateDict = dict[str, Any]

# what a copy or a pickle does not take along
PASSING = {
    *("_held", "_kept", "_newborn", "_opt_called", "_stepping"),
    "_warned_capturable_if_run_uncaptured",
}
# what it must take along
OWN = {"defaults", "state", "param_groups"}
# what a load replaces
LOADED = ("state", "param_groups")


class Persistence(Hooks):
    """The part of an optimizer that saves, loads and copies it."""

    if TYPE_CHECKING:
        declaration: ClassVar[Declaration]
        defaults: dict[str, Any]
        state: defaultdict[Tensor, Any]
        param_groups: list[dict[str, Any]]

        def _state_formula(self) -> Formula | None: ...
        def init_state(self) -> None: ...

    else:
        param_groups = ParamGroups()

    # a wrapper around an optimizer may never call __init__
    _held: tuple[Any, Any, Any] | None = None
    # whose state the constructor has made; until the first step nobody else has
    _newborn: Sequence[Tensor] = ()
    # the state that was made for torch.distributed.checkpoint before the first step
    _rehearsed: Sequence[Made] = ()

    @outside_graphs
    def state_dict(self) -> StateDict:
        """The state and the groups, in torch's layout; tensors are the live ones, not copies."""
        for hook in self._hooks("state_dict_pre"):
            hook(self)
        self._drop_orphans()
        state_dict = pack(self.param_groups, self._saved_state())
        for hook in self._hooks("state_dict_post"):
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def _drop_orphans(self) -> None:
        """Forget the state that the constructor made for parameters that others have replaced.

        accelerate puts sharded parameters into the groups instead of whole ones, which their state
        would keep in memory. It does so after it has saved and loaded the state once.
        """
        members = {id(param) for group in self.param_groups for param in group["params"]}
        orphans = [param for param in self._newborn if id(param) not in members]
        for param in orphans:
            self.state.pop(param, None)
        if orphans:
            self._newborn = ()
        if orphans and not self.state:
            self.init_state()

    def _saved_state(self) -> Mapping[Any, Any]:
        """Return the state to pack; a rule whose tensors must not be saved as is overrides this."""
        return self.state

    @outside_graphs
    def load_state_dict(
        self, state_dict: StateDict, *, strict: bool = True, dtype: str | torch.dtype = "saved"
    ) -> LoadReport:
        """Take over what `state_dict` of this class, or of torch's class of this name, returned.

        Parameters are matched by name where both sides know all names (`named_parameters()`),
        else by order. A named parameter may have moved to another group; a saved group goes to
        the group that shares the most names with it. Tensors are copied, to the device of their
        parameter. `foreach`, `fused`, `capturable` and `differentiable` stay as constructed, and
        so does what the state dict lacks, unless groups do not list it at its default.

        Args:
            state_dict: what to load
            strict: refuse a state dict that does not fit; otherwise load what fits: a parameter
                whose state is missing, or not whole, keeps the state that it has; what only a
                transform lacks, an average say, starts anew
            dtype: keep state in the precision in which it was "saved", cast it to that of its
                parameter ("param"), as torch does, or to this one

        Returns:
            what was not loaded

        Raises:
            ValueError, TypeError, KeyError: it does not fit; nothing is changed
        """
        loading = self._prepare_load(state_dict, strict, Policy(dtype, self.declaration.owner))
        saved, matched, _, _, report = loading
        if strict and not report.is_empty:
            owner = self.declaration.owner
            raise ValueError(refusal(owner, self.param_groups, saved.groups, matched, report))
        self._finish_load(loading)
        return report

    def _prepare_load(self, state_dict: StateDict, strict: bool, policy: Policy) -> Loading:
        """Check a state dict and make what it asks for, without changing anything."""
        given: Any = copy(state_dict)
        for hook in self._hooks("load_state_dict_pre"):
            replaced = hook(self, given)
            given = given if replaced is None else replaced
        # what is made in inference mode could not be written to outside of it
        with torch.inference_mode(False):
            return self._checked_load(given, strict, policy)

    def _checked_load(self, given: Any, strict: bool, policy: Policy) -> Loading:
        saved = read(given, policy.owner)
        matched = match(policy.owner, self.param_groups, saved.groups, strict)
        sources = [None if i is None else saved.groups[i] for i in matched.groups]
        groups = [self._loaded_group(i, source) for i, source in enumerate(sources)]
        layouts = [self._layout(group) for group in groups]
        state, report = load_state(saved, matched, groups, layouts, policy)
        if not strict:
            without = {id(p.param) for key, p in matched.params.items() if key not in saved.state}
            state = {k: v for k, v in self.state.items() if id(k) not in without} | state
        return Loading(saved, matched, groups, state, report)

    def _finish_load(self, loading: Loading) -> None:
        self._take(loading.state, loading.groups)
        for hook in self._hooks("load_state_dict_post"):
            hook(self)

    def _loaded_group(self, index: int, saved: Mapping[str, Any] | None) -> dict[str, Any]:
        merged = load_group(self.param_groups[index], saved)
        settled = {f.name: f.default for f in self.declaration.fields.values() if f.fixed}
        items = {**merged, **settled}
        if saved is not None:
            # a group does not list them at their defaults
            items |= {
                name: default
                for name, default in self.declaration.unlisted.items()
                if name not in saved and name not in EXECUTION
            }
        if not _is_left_by_schedule(items):
            return self.declaration.complete(items, self.defaults, index)
        full = self.declaration.complete({**items, "lr": self.defaults["lr"]}, self.defaults, index)
        return {**full, "lr": items["lr"]}

    def _layout(self, group: Mapping[str, Any]) -> Layout | None:
        formula = self._state_formula()
        if formula is None:
            return None
        fields = self.declaration.fields.values()
        return Layout(
            lambda param: program_for(formula, group, ndim=param.dim()).slots,
            frozenset(formula.slots),
            frozenset(f.name for f in fields if not (f.keyword_only or f.fixed)),
            frozenset(self.declaration.fields),
        )

    def _take(self, state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
        """Make loaded state and groups the optimizer's own."""
        held_state, held_groups = self.state, self.param_groups
        stored = {name: vars(self)[name] for name in LOADED if name in vars(self)}
        fresh: defaultdict[Any, Any] = defaultdict(dict, state)
        try:
            self.__setstate__({"state": fresh, "param_groups": groups})
        except BaseException:
            # a subclass may have its own __setstate__
            Persistence._put_back(self, stored, held_state, held_groups)
            raise
        # a subclass may have a property instead, which knows only what is held
        new_state = fresh if self.state is held_state else self.state
        pairs = zip(held_groups, self.param_groups, groups, strict=True)
        # whoever holds on to a group, or to the state, goes on seeing the optimizer's
        for group, own, loaded in [*pairs]:
            new = dict(loaded if own is group else own)
            dict.clear(group)
            dict.update(group, new)
            if isinstance(group, Checked):
                group.waiting = ", as it was loaded" if _is_left_by_schedule(group) else ""
        held_state.clear()
        held_state.update(new_state)
        Persistence._put_back(self, stored, held_state, held_groups)

    def _put_back(self, stored: Mapping[str, Any], state: Any, groups: Any) -> None:
        """Have the optimizer hold these again; a property without a setter holds them anyway."""
        for name, held in zip(LOADED, (state, groups), strict=True):
            if name in stored:
                vars(self)[name] = stored[name]
            else:
                vars(self).pop(name, None)
            if getattr(self, name) is not held:
                with suppress(AttributeError):
                    setattr(self, name, held)

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to copy: all but hooks and what was patched in from outside."""
        if refuse := vars(self).get("_refuse_copies"):
            # weights are exchanged, of which a copy would not know
            refuse()
        kept = {
            name: value
            for name, value in vars(self).items()
            if name not in PASSING
            and name not in KINDS
            and not callable(getattr(type(self), name, None))
        }
        return kept if KINDS[0] in vars(self) else {**kept, "_is_wrapper": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "defaults" in state and not self._is_wrapper:
            # all of a copy, not what an optimizer or a wrapper loads
            self._make_hooks()
        self._warned_capturable_if_run_uncaptured = True
        self._held = None
        if not (self._is_wrapper and getattr(self, "defaults", None) is None):
            self.defaults.setdefault("differentiable", False)
        # in place: a wrapper around this optimizer, and a shallow copy of it, share the list
        groups = vars(self).get("param_groups", ())
        for index, group in enumerate(groups):
            groups[index] = checked_group(group, self.declaration, index)

    def __copy__(self) -> Persistence:
        new: Persistence = type(self).__new__(type(self))
        new.__setstate__(self.__getstate__())
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Persistence:
        new: Persistence = type(self).__new__(type(self))
        memo[id(self)] = new
        state: Any = self.__getstate__()
        if not isinstance(state, dict):
            new.__setstate__(deepcopy(state, memo))
            return new
        copied = {name: deepcopy(state[name], memo) for name in OWN if name in state}
        for name in state.keys() - OWN:
            # torch's optimizers leave behind all that others have attached to them
            with nullcontext() if isinstance(state[name], Persistence) else suppress(Exception):
                copied[name] = deepcopy(state[name], memo)
        new.__setstate__(copied)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As any object's, without what others have attached and pickle cannot take.

        torch's optimizers leave behind all that is attached to them.
        """
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, state, *rest = reduced
        if isinstance(state, dict):
            state = {k: v for k, v in state.items() if k in OWN or _can_be_pickled(v)}
        return (make, arguments, state, *rest)


def _is_left_by_schedule(group: Mapping[str, Any]) -> bool:
    """Return whether a schedule led the rate below zero, as torch's do one step after their end.

    Such a rate is loaded as it was saved; the step that would use it raises an error.
    """
    rate = group.get("lr")
    return "initial_lr" in group and type(rate) is float and -math.inf < rate < 0


class _Probe(pickle.Pickler):
    """Finds out whether something can be pickled; tensors and optimizers always can."""

    def persistent_id(self, value: Any) -> Any:
        return 0 if isinstance(value, (Tensor, Persistence)) else None


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)


def _can_be_pickled(value: Any) -> bool:
    if value is None or type(value) in (bool, int, float, str, Tensor):
        return True
    try:
        _Probe(_Nowhere()).dump(value)
    # whatever the value's own methods raise
    except Exception:
        return False
    return True
