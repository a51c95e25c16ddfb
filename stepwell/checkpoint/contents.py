"""What of a training goes into a file, and under which names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ..groups.naming import plain_name, unwrapped
from ..version import __version__
from .names import aliases, names_inside
from .reading import SCHEMA
from .schedules import class_of
from .values import Packer

__all__ = [
    "check_module",
    "check_named",
    "check_scheduler",
    "composition_of",
    "describe",
    "header_of",
    "named",
    "packed_optimizer",
    "rule_of",
    "without_transforms",
]


PARTS = ("model", "optimizer", "scheduler", "extra")
"""The parts that most checkpoints have."""


def describe(
    packer: Packer,
    optimizer: torch.optim.Optimizer | None,
    model: torch.nn.Module | None,
    scheduler: Any,
    averaged: torch.nn.Module | None,
    extra: Any,
    randomness: Any,
) -> dict[str, Any]:
    """Everything but the tensors, in JSON; these are gathered by the packer.

    Raises:
        TypeError, ValueError: something cannot be saved; it is named
    """
    parts = {
        # first, so that tied weights have the model's names
        "model": None if model is None else _state_dict(model, "model"),
        "averaged": None if averaged is None else _state_dict(averaged, "averaged"),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "extra": extra,
        "random": randomness,
    }
    packed = {key: packer.pack(part, key) for key, part in parts.items() if part is not None}
    if scheduler is not None:
        packed["scheduler_class"] = class_of(scheduler)
    if optimizer is not None:
        with named(optimizer, model):
            packed["optimizer"] = _optimizer(packer, optimizer)
    return {**header_of(), **packed}


def _state_dict(module: Any, what: str) -> dict[str, Any]:
    check_module(module, f"save: {what}")
    inner = unwrapped(module)
    state_dict = inner.state_dict()
    names = names_inside(inner, state_dict)
    return {names[name]: value for name, value in state_dict.items()}


def check_module(module: Any, what: str) -> None:
    """Check that this is a module.

    Raises:
        TypeError: it is something else, a state dict say
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{what} must be a torch.nn.Module, got {type(module).__name__}")


def check_scheduler(scheduler: Any, owner: str) -> None:
    """Check that this has a state, whoever has made it.

    Raises:
        TypeError: it is something else, a list of schedules say
    """
    methods = [getattr(scheduler, name, None) for name in ("state_dict", "load_state_dict")]
    if isinstance(scheduler, type) or not all(map(callable, methods)):
        is_class = isinstance(scheduler, type)
        raise TypeError(
            f"{owner}: scheduler must be one schedule, with state_dict() and load_state_dict(), "
            f"got {f'the class {scheduler.__name__}' if is_class else type(scheduler).__name__}"
        )


def check_named(given: Sequence[Any], function: str) -> None:
    """Check that nothing but the path was given without its name.

    Raises:
        TypeError: something was; what to write is said
    """
    if given:
        kinds = (torch.nn.Module, torch.optim.Optimizer, LRScheduler)
        names = [
            next((n for n, k in zip(PARTS, kinds, strict=False) if isinstance(each, k)), PARTS[-1])
            for each in given
        ]
        listed = ", ".join(f"{name}={name}" for name in dict.fromkeys(names))
        raise TypeError(f"{function}: say what each part is: {function}(path, {listed})")


def header_of() -> dict[str, Any]:
    """By what a file is written."""
    return {"schema": SCHEMA, "stepwell": __version__, "torch": torch.__version__}


def rule_of(optimizer: Any) -> str:
    """What the rule of an optimizer is called, without what it is composed with."""
    return without_transforms(composition_of(optimizer))


def composition_of(optimizer: Any) -> str:
    """What the rule of an optimizer is called, as in "AdamW+Average"."""
    return str(getattr(optimizer, "composition", type(optimizer).__name__))


def without_transforms(composition: str) -> str:
    """The rules in it alone: "AdamW" of "AdamW+Average"."""
    return re.sub(r"\+\w+", "", composition)


def _optimizer(packer: Packer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    params = {
        name: param
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }
    state_dict: Any = optimizer.state_dict()
    for key in ("param_groups", "state"):
        if not isinstance(state_dict, Mapping) or key not in state_dict:
            raise TypeError(
                f"save: optimizer is a {type(optimizer).__name__}, whose state_dict() has no "
                f"{key!r}, as torch's have: pass the optimizer inside of it, if it is a wrapper, "
                "and the rest as extra"
            )
    return packed_optimizer(packer, state_dict, params, composition_of(optimizer))


def packed_optimizer(
    packer: Packer, state_dict: Mapping[str, Any], params: Mapping[str, Any], rule: str
) -> dict[str, Any]:
    """An optimizer's state dict in JSON, with names in place of numbers.

    Args:
        packer: gathers the tensors
        state_dict: in torch's layout, with names in every group
        params: the parameters by name, or None for one that is not known
        rule: what it is the state of, empty if that is not known

    Raises:
        ValueError: a parameter, or a name, is listed twice
    """
    groups, state = state_dict["param_groups"], state_dict["state"]
    ids = [number for group in groups for number in group["params"]]
    names = dict(zip(ids, (name for g in groups for name in g["param_names"]), strict=True))
    if not len(ids) == len(names) == len(set(names.values())):
        raise ValueError("save: a parameter, or a name, is listed twice in the optimizer")
    others = {key: value for key, value in state.items() if key not in names}
    return {
        "rule": rule,
        "params": {name: _shape_and_dtype(params[name]) for name in names.values()},
        "groups": [packer.pack(_group(group), f"group {i}") for i, group in enumerate(groups)],
        "state": {
            name: packer.pack(state[key], f"optimizer.{name}")
            for key, name in names.items()
            if key in state
        },
        "others": packer.pack(others, "optimizer"),
    }


def _shape_and_dtype(param: Tensor | None) -> list[Any] | None:
    if param is None:
        return None
    return [list(param.shape), str(param.dtype).removeprefix("torch.")]


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    return {"params": list(group["param_names"]), **kept}


@contextmanager
def named(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> Iterator[None]:
    """Inside, every group knows the names of its parameters, by the model if not by itself.

    They are those inside of all wrappers.

    Raises:
        ValueError: a parameter has no name, or one that is listed twice
    """
    known = {} if model is None else aliases(unwrapped(model))
    groups = optimizer.param_groups
    others = _ambiguous(known, groups)
    found = [_names(known, others, group, index) for index, group in enumerate(groups)]
    _check_unique(found)
    lent = []
    try:
        for group, names in zip(groups, found, strict=True):
            own = group.get("param_names")
            if own != names:
                dict.__setitem__(group, "param_names", names)
                lent.append((group, own))
        yield
    finally:
        for group, own in lent:
            dict.pop(group, "param_names", None)
            if own is not None:
                dict.__setitem__(group, "param_names", own)


def _ambiguous(
    known: Mapping[int, Sequence[str]], groups: Sequence[Mapping[str, Any]]
) -> Collection[str]:
    """The names that mean a certain parameter of the model, or two in the optimizer."""
    own = Counter(plain_name(str(n)) for group in groups for n in group.get("param_names") or ())
    return {*chain(*known.values()), *(name for name, times in own.items() if times > 1)}


def _check_unique(names: Sequence[Sequence[str]]) -> None:
    for name, times in Counter(chain(*names)).items():
        if times > 1:
            raise ValueError(
                f"{name} is listed twice in the optimizer, and a checkpoint is matched by name: "
                "pass model=, or put models side by side into an nn.ModuleDict, whose "
                "named_parameters() have prefixes"
            )


def _names(
    known: Mapping[int, Sequence[str]],
    ambiguous: Collection[str],
    group: Mapping[str, Any],
    index: int,
) -> list[str]:
    params, own = group["params"], group.get("param_names")
    if own is None or len(own) != len(params):
        return [_name(known, param, index, i) for i, param in enumerate(params)]
    pairs = zip(own, params, strict=True)
    return [_own_name(str(name), known.get(id(param), ()), ambiguous) for name, param in pairs]


def _name(known: Mapping[int, Sequence[str]], param: Tensor, group: int, number: int) -> str:
    if id(param) not in known:
        raise ValueError(
            f"group {group}, parameter {number} has no name, by which a checkpoint could be "
            "matched: pass model=, or make the optimizer from model.named_parameters()"
        )
    return known[id(param)][0]


def _own_name(name: str, known: Sequence[str], ambiguous: Collection[str]) -> str:
    """The optimizer's name of a parameter without what wrappers put into it.

    It is the model's where that tells, and where the optimizer's own may mean another parameter.
    """
    name = plain_name(name)
    if name in known or not known:
        return name
    # DistributedDataParallel's is a name that a model may have as well
    other = known[0] if name in ambiguous else name
    return next((each for each in known if _bare(each) == _bare(name)), other)


def _bare(name: str) -> list[str]:
    return [part for part in name.split(".") if part != "module"]
