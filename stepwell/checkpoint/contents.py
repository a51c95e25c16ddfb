"""What of a training goes into a file, and under which names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ..groups.naming import unwrapped
from .reading import SCHEMA
from .values import Packer

__all__ = ["describe", "header_of", "named", "packed_optimizer", "rule_of"]


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
        "model": None if model is None else unwrapped(model).state_dict(),
        "averaged": None if averaged is None else averaged.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "extra": extra,
        "random": randomness,
    }
    packed = {key: packer.pack(part, key) for key, part in parts.items() if part is not None}
    if optimizer is not None:
        with named(optimizer, model):
            packed["optimizer"] = _optimizer(packer, optimizer)
    return {**header_of(), **packed}


def header_of() -> dict[str, Any]:
    """By what a file is written."""
    return {"schema": SCHEMA, "stepwell": _own_version(), "torch": torch.__version__}


def _own_version() -> str:
    try:
        return version("stepwell")
    except PackageNotFoundError:
        return "unknown"


def rule_of(optimizer: Any) -> str:
    """What the rule of an optimizer is called, without what it is composed with."""
    declaration = getattr(optimizer, "declaration", None)
    name: str = type(optimizer).__name__ if declaration is None else declaration.owner
    return name.partition("+")[0]


def _optimizer(packer: Packer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    params = {
        name: param
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }
    return packed_optimizer(packer, optimizer.state_dict(), params, rule_of(optimizer))


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

    Raises:
        ValueError: a parameter has no name
    """
    known = {} if model is None else _names(model)
    lent = []
    try:
        for index, group in enumerate(optimizer.param_groups):
            own = group.get("param_names")
            if own is None or len(own) != len(group["params"]):
                names = [_name(known, p, index, i) for i, p in enumerate(group["params"])]
                dict.__setitem__(group, "param_names", names)
                lent.append((group, own))
        yield
    finally:
        for group, own in lent:
            dict.pop(group, "param_names", None)
            if own is not None:
                dict.__setitem__(group, "param_names", own)


def _names(model: torch.nn.Module) -> dict[int, str]:
    """The first name of each parameter, by its identity."""
    found: dict[int, str] = {}
    for name, param in unwrapped(model).named_parameters(remove_duplicate=False):
        found.setdefault(id(param), name)
    return found


def _name(known: Mapping[int, str], param: Tensor, group: int, number: int) -> str:
    if id(param) not in known:
        raise ValueError(
            f"group {group}, parameter {number} has no name, by which a checkpoint could be "
            "matched: pass model=, or make the optimizer from model.named_parameters()"
        )
    return known[id(param)]
