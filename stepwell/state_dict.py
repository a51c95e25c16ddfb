"""State dicts: torch's layout, and what of a loaded one belongs to which parameter.

Everything here is a pure function: nothing of the optimizer is changed, and no tensor of a loaded
state dict is handed on, only copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cohort import state_shape
from .language import Transform
from .language.fields import SCHEDULED, MissingKeyError, Slot
from .language.number import is_fake, is_number
from .matching import EXECUTION, LoadReport, Match, Place, nearest

__all__ = [
    "Layout",
    "Loading",
    "Policy",
    "Saved",
    "load_group",
    "load_state",
    "pack",
    "read",
]

Group = Mapping[str, Any]


def pack(groups: Sequence[Group], state: Mapping[Any, Any]) -> dict[str, Any]:
    """The state dict: parameters become numbers, everything else is what the optimizer holds."""
    ids: dict[int, int] = {}
    packed: list[dict[str, Any]] = []
    first = 0
    for group in groups:
        new = {id(param): i for i, param in enumerate(group["params"], first)}
        for key, i in new.items():
            # a parameter keeps the number that it got first
            ids.setdefault(key, i)
        first += len(group["params"])
        packed.append({**group, "params": [ids[id(param)] for param in group["params"]]})
    numbered: dict[Any, Any] = {}
    for key, value in state.items():
        if not isinstance(key, Tensor):
            numbered[key] = value
        # a parameter that was taken out of its group has no number
        elif id(key) in ids and value != {}:
            numbered[ids[id(key)]] = value
    return {"state": numbered, "param_groups": packed}


class Saved(NamedTuple):
    """A state dict whose outer form has been checked; the groups are copies."""

    state: Mapping[Any, Any]
    groups: list[dict[str, Any]]


def read(state_dict: Any, owner: str) -> Saved:
    """The two parts of a state dict.

    Raises:
        TypeError, KeyError, ValueError: it is none
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{owner}: state_dict must be a dict, got {type(state_dict).__name__}")
    for key in ("param_groups", "state"):
        if key not in state_dict:
            known = ", ".join(map(str, state_dict)) or "nothing"
            raise MissingKeyError(
                f"{key} ({owner}: a state dict of an optimizer has it, this has {known})"
            )
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(groups, (list, tuple)) or not isinstance(state, Mapping):
        raise ValueError(f"{owner}: a state dict has a list of param_groups and a dict of state")
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"{owner}: group {index} of the state dict has no list of params")
        if not all(isinstance(key, Hashable) for key in group["params"]):
            raise ValueError(f"{owner}: group {index} of the state dict: params must be ids")
    return Saved(state, [deepcopy(dict(group)) for group in groups])


class Loading(NamedTuple):
    """What an optimizer would hold after loading a state dict; so far nothing is changed.

    Attributes:
        saved: what is loaded
        matched: what of it belongs to which parameter
        groups, state: what the optimizer would hold
        report: what of it does not fit
    """

    saved: Saved
    matched: Match
    groups: list[dict[str, Any]]
    state: dict[Any, Any]
    report: LoadReport


@dataclass(frozen=True)
class Policy:
    """In which precision loaded state is kept: "saved", "param", or one dtype for all.

    Attributes:
        deferred: tensors on the meta device are no mistake: their values will be filled in later
    """

    dtype: str | torch.dtype
    owner: str
    deferred: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.dtype, torch.dtype):
            fits = self.dtype.is_floating_point
        else:
            fits = self.dtype in ("saved", "param")
        if not fits:
            raise ValueError(
                f"{self.owner}: dtype must be 'saved', 'param' or a floating point torch.dtype, "
                f"got {self.dtype!r}"
            )

    def dtype_of(self, value: Tensor, param: Tensor) -> torch.dtype:
        """The dtype in which this tensor is kept."""
        dtype = param.dtype if self.dtype == "param" else self.dtype
        if not isinstance(dtype, torch.dtype) or not (_is_inexact(value) and _is_inexact(param)):
            return value.dtype
        return dtype.to_complex() if value.is_complex() else dtype.to_real()

    def defers(self, value: Tensor) -> bool:
        """Return whether this tensor has no values yet and may go without them for now."""
        return self.deferred and value.is_meta

    def check_values(self, value: Tensor, param: Tensor) -> None:
        """Refuse a tensor without values where they are needed.

        Raises:
            ValueError: it lies on the meta device, and its parameter does not
        """
        if value.is_meta and not (param.is_meta or self.deferred):
            raise ValueError(
                f"{self.owner}: the state dict has a tensor of shape {tuple(value.shape)} on the "
                "meta device, where tensors have no values; load those first"
            )


def _is_inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def load_group(owned: Group, saved: Group | None) -> dict[str, Any]:
    """The group with the hyperparameters of a saved one.

    It keeps its parameters, the flags that say how this machine runs a step, and what the saved
    one lacks: a hyperparameter that is newer than the state dict, or a scheduler's `initial_lr`.
    Those of a transform that the rule is composed without do not come along. Tensors are as they
    were saved, on the devices of those that they replace.
    """
    if saved is None:
        return dict(owned)
    names = saved.get("param_names")
    absent = [name for transform in _absent(saved, owned) for name in transform.fields]
    kept = {"params", *EXECUTION, *absent}
    are_names = isinstance(names, (list, tuple)) and len(names) == len(owned["params"])
    if "param_names" in owned or not are_names:
        kept.add("param_names")
    taken = {k: _beside(value, owned.get(k)) for k, value in saved.items() if k not in kept}
    return {**owned, **taken}


def _beside(value: Any, held: Any) -> Any:
    """The value, on the device of the one that it replaces; no two groups share a tensor."""
    if isinstance(value, Tensor) and isinstance(held, Tensor):
        return deepcopy(value).to(held.device)
    if isinstance(value, tuple) and isinstance(held, tuple) and len(value) == len(held):
        return tuple(map(_beside, value, held))
    return deepcopy(value)


@dataclass(frozen=True)
class Layout:
    """The state that a rule declares, under the hyperparameters of one group.

    Attributes:
        slots: what the state of a parameter holds
        names: what it may hold under any hyperparameters, but for a count of steps
        hyperparameters: the keys by which a group is known to be of this rule
        keys: all the keys that the rule gives to its groups
    """

    slots: Callable[[Tensor], Mapping[str, Slot]]
    names: frozenset[str]
    hyperparameters: frozenset[str]
    keys: frozenset[str]


def load_state(
    saved: Saved,
    matched: Match,
    groups: Sequence[Group],
    layouts: Sequence[Layout | None],
    policy: Policy,
) -> tuple[dict[Any, Any], LoadReport]:
    """The state of each matched parameter, whole or, if an entry does not fit, not at all.

    What only a transform lacks is reported, and left out: it starts anew at the next step. So is
    what a transform has kept that the rule is composed without: it would not be kept up.
    `groups` are the optimizer's groups as they will be; without a `Layout` whatever is saved for
    a parameter is taken. State under a key that is no parameter is kept, as torch keeps it.
    """
    state: dict[Any, Any] = {}
    pairs = enumerate(zip(matched.groups, layouts, strict=True))
    reports = [matched.report]
    known = [(n, saved.groups[i], x) for n, (i, x) in pairs if i is not None and x]
    reports += [_other_rule(*each) for each in known]
    reports += [_of_transforms(policy.owner, *each) for each in known]
    listed = {key for group in saved.groups for key in group["params"]}
    for key, entry in saved.state.items():
        place = matched.params.get(key)
        if place is not None:
            layout = layouts[place.group]
            source = matched.source(place.group, saved.groups)
            entry = _without_absent(entry, source, layout)
            report, is_whole = _fit(entry, place, source, layout)
            reports.append(report)
            if is_whole:
                state[place.param] = _copy_entry(entry, place, groups, layout, policy)
        elif key not in listed and isinstance(key, int):
            reports.append(LoadReport(unexpected=(f"state of id {key}, which no group lists",)))
        elif key not in listed:
            state[key] = _copy(entry, None, policy)
    columns = zip(*reports, strict=True)
    return state, LoadReport(*(tuple(x for part in parts for x in part) for parts in columns))


def _absent(source: Group, known: Container[str]) -> list[type[Transform]]:
    """The transforms with state that saved this group, and of which nothing is known here."""
    return [
        transform
        for transform in Transform.__subclasses__()
        if transform.slots
        and transform.fields
        and transform.fields.keys() <= source.keys()
        and not any(name in known for name in transform.fields)
    ]


def _of_transforms(owner: str, index: int, source: Group, layout: Layout) -> LoadReport:
    """What a saved group has of transforms that the rule is composed without."""
    unexpected = tuple(
        f"group {index}: {', '.join(transform.slots)} of {transform.__name__} "
        f"(compose({owner}, {transform.__name__}) goes on with them)"
        for transform in _absent(source, layout.keys)
    )
    return LoadReport(unexpected=unexpected)


def _other_rule(index: int, source: Group, layout: Layout) -> LoadReport:
    """What is missing from a saved group that seems to be of another rule.

    One hyperparameter may be newer than the state dict, and a group that was written by hand may
    hold only a few; one of another rule has that rule's instead.
    """
    missing = sorted(layout.hyperparameters - source.keys())
    others = set(source).difference(layout.keys, SCHEDULED, EXECUTION, ("params", "param_names"))
    if len(missing) < 2 or len(others) < 2:
        return LoadReport()
    what = f"group {index}: {', '.join(missing)} (was it saved by another optimizer?)"
    return LoadReport(missing=(what,))


def _without_absent(entry: Any, source: Group, layout: Layout | None) -> Any:
    """The state of one parameter without what belongs to transforms that are not here."""
    absent = _absent(source, layout.keys) if layout else []
    if not absent or not isinstance(entry, Mapping):
        return entry
    dropped = {name for transform in absent for name in transform.slots}
    return {name: value for name, value in entry.items() if name not in dropped}


def _fit(entry: Any, place: Place, source: Group, layout: Layout | None) -> tuple[LoadReport, bool]:
    """What is wrong with the saved state of one parameter, and whether all its rule needs fits."""
    if layout is None or entry == {}:
        return LoadReport(), True
    if not isinstance(entry, Mapping):
        words = f"{place.label}: state must be a dict, got {entry!r:.40}"
        return LoadReport(mismatched=(words,)), False
    slots = layout.slots(place.param)
    present = {name: value for name, value in entry.items() if value is not None}
    missing = [n for n, s in slots.items() if s.initial is not None and n not in present]
    foreign = [name for name in present if name not in layout.names | slots.keys()]
    lacks = [name for name in missing if not slots[name].added]
    if not lacks and layout.hyperparameters <= source.keys():
        # a state dict of this rule, to which somebody has added entries: they are kept
        foreign = []
    problems = {
        name: _problem(name, present[name], slot, place.param)
        for name, slot in slots.items()
        if name in present
    }
    report = LoadReport(
        tuple(f"{place.label}: {_lacking(n, slots[n], foreign, lacks)}" for n in missing),
        tuple(f"{place.label}: {name}" for name in foreign),
        tuple(f"{place.label}: {n} {problem}" for n, problem in problems.items() if problem),
    )
    return report, not (lacks or report.unexpected or report.mismatched)


def _lacking(name: str, slot: Slot, foreign: Sequence[str], lacks: Sequence[str]) -> str:
    """Return the message for an entry that a saved state lacks; a transform may begin it anew."""
    if slot.added and not lacks:
        return f"{name} (the state dict has none; strict=False begins it anew)"
    return nearest(name, foreign, "the state dict has")


def _problem(name: str, value: Any, slot: Slot, param: Tensor) -> str | None:
    kind = str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
    if slot.scalar:
        if not is_number(value):
            return f"must be one number, got {kind}"
        if isinstance(value, Tensor) and is_fake(value):
            return None
        number = float(value)
        if not math.isfinite(number) or (name == "step" and number < 0):
            return f"must be {'a count' if name == 'step' else 'finite'}, got {number:g}"
        return None
    shape = state_shape(slot, param)
    if not isinstance(value, Tensor) or value.shape != shape:
        return f"must have shape {tuple(shape)}, got {kind}"
    if _is_inexact(param) and not (_is_inexact(value) and value.is_complex() == param.is_complex()):
        return f"is {value.dtype}, the parameter is {param.dtype}"
    return None


def _copy_entry(
    entry: Any, place: Place, groups: Sequence[Group], layout: Layout | None, policy: Policy
) -> Any:
    """The state of one parameter, on its device; numbers on the host, unless capturable."""
    if layout is None:
        return _copy(entry, place.param, policy)
    capturable = bool(groups[place.group].get("capturable"))
    copied: dict[Any, Any] = {}
    slots = layout.slots(place.param)
    for name, value in entry.items():
        slot = slots.get(name)
        if value is None and name in layout.names:
            # how torch once wrote a buffer that is not there
            continue
        if slot is None:
            copied[name] = _copy(value, place.param, policy)
        elif slot.scalar:
            copied[name] = _copy_number(value, place.param.device if capturable else "cpu")
        else:
            copied[name] = _copy_tensor(value, place.param, policy, slot.wide)
    return copied


def _copy_number(value: Any, device: torch.device | str) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=_number_dtype(), device=device)
    if value.is_meta:
        device = value.device
    exact = value.dtype in (torch.float32, torch.float64)
    dtype = value.dtype if exact else _number_dtype()
    return value.detach().reshape(()).to(device=device, dtype=dtype, copy=True)


def _number_dtype() -> torch.dtype:
    wide = torch.get_default_dtype() == torch.float64
    return torch.float64 if wide else torch.float32


def _copy_tensor(value: Tensor, param: Tensor, policy: Policy, wide: bool) -> Tensor:
    """A copy in the layout of the parameter; what is `wide` is never in half precision."""
    policy.check_values(value, param)
    dtype = policy.dtype_of(value, param)
    dtype = torch.promote_types(dtype, torch.float32) if wide else dtype
    if value.layout is not torch.strided:
        value = value.to_dense()
    if value.shape != param.shape or type(value) is not Tensor:
        return _copied_to(value, param, policy, dtype)
    # a back-end runs flat over tensors whose elements lie in the order of the parameter's
    with torch.no_grad():
        like = torch.empty_like(param, dtype=dtype, requires_grad=False)
        return like if policy.defers(value) else like.copy_(value)


def _copied_to(value: Tensor, param: Tensor, policy: Policy, dtype: torch.dtype) -> Tensor:
    policy.check_values(value, param)
    if policy.defers(value):
        return torch.empty_like(value, dtype=dtype, device=param.device)
    return value.detach().to(device=param.device, dtype=dtype, copy=True)


def _copy(value: Any, param: Tensor | None, policy: Policy, name: object = None) -> Any:
    """A value of state that nobody has declared, with copies of the tensors in it."""
    if isinstance(value, Tensor):
        if param is None or name == "step":
            return value.detach().clone()
        return _copied_to(value, param, policy, policy.dtype_of(value, param))
    if isinstance(value, Mapping):
        return {key: _copy(item, param, policy, key) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy(item, param, policy, name) for item in value)
    return value
