"""Combined: several optimizers, each with parameters of its own, behind one.

Trainers, schedules and checkpoints take one optimizer. A model whose hidden matrices are for `Muon`
and whose other parameters are for `AdamW` needs two.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from textwrap import indent
from types import MappingProxyType
from typing import Any

from torch.optim import Optimizer as TorchOptimizer

from ..cohort import Scaling
from ..optimizer import Optimizer
from ..param_groups import check_company, params_of
from ..plan import Stepper
from ..state_dict import Layout, Loading, Policy, load_group
from .joined_state import JoinedState
from .together import Together

__all__ = ["Combined"]

KEY = "optimizer"
"""The key under which each group says which optimizer it belongs to."""

Members = dict[str, TorchOptimizer]


class Combined(Optimizer):
    """Several optimizers, each with parameters of its own, that step as one.

        hidden, others = stepwell.groups.muon_split(model)
        optimizer = Combined(
            {
                "muon": Muon(hidden, lr=0.02),
                "adamw": AdamW(no_decay(others), lr=3e-4),
            }
        )

    `param_groups` lists the groups of all of them, in their order. They are the very same dicts, so
    schedules and manual edits of `lr` take effect. Each group says under "optimizer" which one it
    belongs to. `state` is one mapping over all states. `state_dict()` has torch's
    layout; on loading, parameters are matched by name, or else by order.

    A step runs the hooks that come before the steps of the optimizers, checks and reads what all of
    them need, and only then changes the first parameter. An optimizer of torch or of another
    library, and one with a `step` of its own, is asked to `step()` last. `ClipNorm`
    composed with one of the optimizers clips its own gradients only.

    Args:
        optimizers: the optimizers by name

    Attributes:
        optimizers: the optimizers by name, read-only

    Raises:
        TypeError: one of them is no optimizer, or needs to call the closure itself, as `LBFGS`
        ValueError: there is none, or they share a parameter, or only some know parameters' names

    >>> hidden, bias = (torch.nn.Parameter(torch.eye(2)), torch.nn.Parameter(torch.ones(1)))
    >>> optimizer = Combined({"muon": Muon([hidden], lr=0.1), "sgd": SGD([bias], lr=0.5)})
    >>> bias.grad = torch.ones(1)
    >>> optimizer.step()  # hidden has no gradient; 1 - 0.5 * 1
    >>> bias.item()
    0.5
    >>> [(group["optimizer"], group["lr"]) for group in optimizer.param_groups]
    [('muon', 0.1), ('sgd', 0.5)]
    """

    def __init__(self, optimizers: Mapping[str, TorchOptimizer]) -> None:
        members = _checked(optimizers)
        self._members = members
        self._outer: dict[Any, Any] = {}
        self._warned_capturable_if_run_uncaptured = True
        self._make_hooks()
        self._join()

    def _join(self, order: Sequence[tuple[str, int]] = ()) -> None:
        """Make what is seen from outside, of the optimizers as they are.

        Args:
            order: the groups in the order in which they joined, by the name of their optimizer and
                their number there; without it, those of one optimizer after those of the other
        """
        defaults = [member.defaults for member in self._members.values()]
        shared = set(defaults[0]).intersection(*defaults)
        self.defaults = {key: value for key, value in defaults[0].items() if key in shared}
        self._state = JoinedState(self._members, self._outer)
        joined = [self._members[name].param_groups[number] for name, number in order]
        self._groups: list[dict[str, Any]] = joined
        # as it was when list and optimizers were last found to agree, and the optimizers' own then
        self._agreed: list[dict[str, Any]] = list(joined)
        self._seen: list[dict[str, Any]] = []
        self._held = None
        if all(getattr(m, "_step_supports_amp_scaling", False) for m in self._members.values()):
            self._step_supports_amp_scaling = True
        self._settle()

    @property
    def optimizers(self) -> Mapping[str, TorchOptimizer]:
        """The optimizers by name."""
        return MappingProxyType(self._members)

    @property
    def composition(self) -> str:
        """Return the name of the rule in checkpoints, as in "Combined(adamw=AdamW, muon=Muon)"."""
        parts = (
            f"{name}={getattr(member, 'composition', type(member).__name__)}"
            # the order in which they are given tells nothing
            for name, member in sorted(self._members.items())
        )
        return f"{type(self).__name__}({', '.join(parts)})"

    # Groups and state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, in the order in which they joined; always the same list."""
        theirs = [group for group, _ in self._owned()]
        if _are_same(self._groups, self._agreed) and not _are_same(theirs, self._seen):
            there, known = set(map(id, theirs)), set(map(id, self._agreed))
            for group, name in self._owned():
                if id(group) not in known:
                    dict.__setitem__(group, KEY, name)
            self._agreed = [group for group in self._agreed if id(group) in there]
            self._agreed += [group for group in theirs if id(group) not in known]
            self._groups[:] = self._agreed
            self._seen = theirs
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups

    @property  # type: ignore[override]
    def state(self) -> MutableMapping[Any, Any]:
        """The state of all optimizers, by parameter."""
        return self._state

    @state.setter
    def state(self, state: Mapping[Any, Any]) -> None:
        if state is not self._state:
            kept = dict(state)
            self._state.clear()
            self._state.update(kept)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Optimize more parameters.

        Args:
            param_group: "params", under "optimizer" the name of the one that is to update them,
                and hyperparameters that differ from its defaults

        Raises:
            TypeError, ValueError, KeyError, RuntimeError: nothing is changed
        """
        self._settle()
        name, index = self._name_of(param_group, len(self._groups)), len(self._groups)
        given = params_of(param_group, f"Combined, group {index}")
        check_company({**param_group, **given}, self._groups, f"Combined, group {index}")
        own = {key: value for key, value in param_group.items() if key != KEY}
        self._members[name].add_param_group(own)
        # schedules go by the position of a group
        param_group.update(self.param_groups[-1])

    def _name_of(self, group: Any, index: int) -> str:
        name = group.get(KEY) if isinstance(group, Mapping) else None
        if not isinstance(name, str) or name not in self._members:
            known = ", ".join(map(repr, self._members))
            got = type(name).__name__ if isinstance(name, TorchOptimizer) else repr(name)
            raise ValueError(
                f"Combined, group {index}: the key 'optimizer' must say which one its parameters "
                f"are for, one of {known}, as in {{'params': ..., 'optimizer': "
                f"{next(iter(self._members))!r}}}; got {got}"
            )
        return str(name)

    def _settle(self) -> None:
        """Give the optimizers the groups that were put into `param_groups`, or taken out of it.

        Raises:
            ValueError: a group does not say whose it is, or names another one; nothing is changed
        """
        groups = self.param_groups
        for index, (group, name) in enumerate(self._owned()):
            if group.get(KEY) != name:
                raise ValueError(
                    f"Combined, group {index}: its parameters belong to {name!r}, but its key "
                    f"'optimizer' is {group.get(KEY)!r}; to move them, take the group out of "
                    "param_groups and add_param_group() one that names the other optimizer"
                )
        if _are_same(groups, self._agreed):
            return
        shares: dict[str, list[dict[str, Any]]] = {name: [] for name in self._members}
        for index, group in enumerate(groups):
            shares[self._name_of(group, index)].append(group)
            place = f"Combined, group {index}"
            check_company({**group, **params_of(group, place)}, groups[:index], place)
        for name, member in self._members.items():
            if not _are_same(member.param_groups, shares[name]):
                member.param_groups = shares[name]
            others = [group for other, own in shares.items() if other != name for group in own]
            for param in [param for group in others for param in group["params"]]:
                # what one rule keeps means nothing to another
                member.state.pop(param, None)
        self._agreed = list(groups)
        self._seen = [group for group, _ in self._owned()]

    def _owned(self) -> Iterator[tuple[dict[str, Any], str]]:
        """The groups of the optimizers, each with the name of its own."""
        for name, member in self._members.items():
            for group in member.param_groups:
                yield group, name

    def init_state(self) -> None:
        """Make the state that a first step would make, without taking one.

        An optimizer of torch makes its own at its first step.
        """
        self._settle()
        for member in self._members.values():
            if isinstance(member, Optimizer):
                member.init_state()

    # The step

    def _make_plan(self, scaling: Scaling) -> Stepper:
        return Together(self._members)

    def _prepare(self) -> Callable[[], None]:
        self._settle()
        return super()._prepare()

    # Checkpoints

    def _saved_state(self) -> Mapping[Any, Any]:
        self._settle()
        parts = [
            member._saved_state() if isinstance(member, Optimizer) else member.state
            for member in self._members.values()
        ]
        return {key: value for part in (*parts, self._outer) for key, value in part.items()}

    def _prepare_load(self, state_dict: Any, strict: bool, policy: Policy) -> Loading:
        self._settle()
        loading = super()._prepare_load(state_dict, strict, policy)
        if loading.matched.by_name:
            return loading
        report = loading.report
        pairs = enumerate(zip(self._groups, loading.matched.groups, strict=True))
        found = [
            (i, own[KEY], loading.saved.groups[k].get(KEY))
            for i, (own, k) in pairs
            if k is not None
        ]
        moved = tuple(
            f"group {index}: belonged to {was!r} in the state dict and belongs to {now!r} here; "
            "without parameter names groups are matched by order: list the optimizers in the "
            "saved order"
            for index, now, was in found
            if was in self._members and was != now
        )
        return loading._replace(report=report._replace(mismatched=report.mismatched + moved))

    def _loaded_group(self, index: int, saved: Mapping[str, Any] | None) -> dict[str, Any]:
        group = self.param_groups[index]
        member = self._members[group[KEY]]
        place = next(i for i, own in enumerate(member.param_groups) if own is group)
        if isinstance(member, Optimizer):
            loaded = member._loaded_group(place, saved)
        else:
            loaded = load_group(group, saved)
        return {**loaded, KEY: group[KEY]}

    def _layout(self, group: Mapping[str, Any]) -> Layout | None:
        member = self._members[group[KEY]]
        return member._layout(group) if isinstance(member, Optimizer) else None

    def _take(self, state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
        before = dict(self.state), [dict(group) for group in self.param_groups]
        try:
            self._hand_out(state, groups)
        except BaseException:
            self._hand_out(*before)
            raise

    def _hand_out(self, state: Mapping[Any, Any], groups: Sequence[dict[str, Any]]) -> None:
        rest = dict(state)
        loaded = {id(own): new for own, new in zip(self.param_groups, groups, strict=True)}
        for member in self._members.values():
            own = [loaded[id(group)] for group in member.param_groups]
            params = [param for group in own for param in group["params"]]
            # an optimizer of another library is taken for one of torch
            Optimizer._take(member, {p: rest.pop(p) for p in params if p in rest}, own)  # type: ignore[arg-type]
        self._outer.clear()
        self._outer.update(rest)

    def _finish_load(self, loading: Loading) -> None:
        super()._finish_load(loading)
        for member in self._members.values():
            hooks = getattr(member, "_optimizer_load_state_dict_post_hooks", {})
            for hook in list(hooks.values()):
                hook(member)

    # Copies and words

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        made = {"defaults", "_state", "_groups", "_agreed", "_seen", "_step_supports_amp_scaling"}
        kept = {name: value for name, value in kept.items() if name not in made}
        self._settle()
        places = {
            id(group): (name, number)
            for name, member in self._members.items()
            for number, group in enumerate(member.param_groups)
        }
        return {**kept, "order": [places[id(group)] for group in self._groups]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        order = state.get("order", ())
        vars(self).update({name: value for name, value in state.items() if name != "order"})
        self._warned_capturable_if_run_uncaptured = True
        self._make_hooks()
        self._join(order)

    def __repr__(self) -> str:
        parts = [indent(f"{name}: {member!r}", "  ") for name, member in self._members.items()]
        return "\n".join([f"{type(self).__name__} (", *parts, ")"])


def _checked(optimizers: Any) -> Members:
    """The optimizers, if they can be combined.

    Raises:
        TypeError, ValueError: they cannot
    """
    if not isinstance(optimizers, Mapping):
        raise TypeError(
            "Combined: optimizers must be a dict of optimizers by name, as in "
            f'{{"muon": Muon(...), "adamw": AdamW(...)}}, got {type(optimizers).__name__} (where a '
            "trainer expects a class, pass a function that makes the optimizer)"
        )
    if not optimizers:
        raise ValueError("Combined: the dict of optimizers is empty")
    groups: list[dict[str, Any]] = []
    for name, member in optimizers.items():
        _check_member(name, member)
        for group in member.param_groups:
            _check_shared(name, group, optimizers, groups)
            check_company(group, groups, f"Combined: {name!r}; name all or none of them")
        groups += member.param_groups
    return dict(optimizers)


def _check_shared(name: str, group: Any, optimizers: Any, before: Sequence[Any]) -> None:
    taken = {id(param) for other in before for param in other["params"]}
    for index, param in enumerate(group["params"]):
        if id(param) in taken:
            first = next(
                other
                for other, member in optimizers.items()
                if any(param is p for g in member.param_groups for p in g["params"])
            )
            names = group.get("param_names")
            raise ValueError(
                "some parameters appear in more than one parameter group (Combined: parameter "
                f"{repr(names[index]) if names else index} of {name!r} already belongs to "
                f"{first!r})"
            )


def _check_member(name: Any, member: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"Combined: the names of optimizers must be texts, got {name!r}")
    if isinstance(member, type) and issubclass(member, TorchOptimizer):
        raise TypeError(
            f"Combined: {name!r} is the class {member.__name__}: construct it with its "
            f"parameters, as in {member.__name__}(params, lr=0.01)"
        )
    if isinstance(member, Combined):
        raise TypeError(
            f"Combined: {name!r} is a Combined already: list its optimizers in this one, "
            "{**combined.optimizers, ...}"
        )
    if not isinstance(member, TorchOptimizer):
        raise TypeError(f"Combined: {name!r} must be an optimizer, got {type(member).__name__}")
    for method in ("state_dict", "load_state_dict"):
        known = getattr(TorchOptimizer, method), getattr(Optimizer, method)
        if getattr(type(member), method) not in known:
            raise TypeError(
                f"Combined: {name!r} ({type(member).__name__}) has a {method} of its own, with "
                "what Combined would not save; keep it apart, or combine the optimizer inside"
            )
    closure = inspect.signature(member.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"Combined: {name!r} ({type(member).__name__}) evaluates its closure several times per "
            "step, and the other optimizers would step each time; call its step() separately"
        )


def _are_same(one: Sequence[object], other: Sequence[object]) -> bool:
    """Return whether both hold the very same objects in the same order."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
