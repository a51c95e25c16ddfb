"""The optimizer in a file: its state dict in torch's layout, and what it is of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..matching import LoadReport
from ..optimizer import Optimizer
from ..state_dict import Loading, Policy
from .contents import rule_of
from .header import CheckpointError
from .reading import File
from .values import unpack

__all__ = [
    "Rename",
    "Source",
    "as_real",
    "checked_optimizer",
    "kinds",
    "renamed",
    "state_dict_of",
    "state_dict_with",
    "targets",
]

Rename = Mapping[str, str]

SMALL = 1 << 16
"""Up to so many bytes, a tensor is read before it is known where it goes."""


class Source:
    """The tensors of a file as they are asked for: small ones, and stand-ins for large ones."""

    def __init__(self, file: File, *, whole: bool = False) -> None:
        self._file = file
        self._whole = whole
        self._names: dict[int, tuple[Tensor, str]] = {}

    def __call__(self, name: str, is_complex: bool) -> Tensor:
        if self._whole or self._file.num_bytes(name) <= SMALL:
            tensor = self._file.tensor(name)
            return torch.view_as_complex(tensor) if is_complex else tensor
        tensor = self._file.like(name)
        if is_complex:
            dtype = tensor.dtype.to_complex()
            tensor = torch.empty(tensor.shape[:-1], dtype=dtype, device="meta")
        self._names[id(tensor)] = tensor, name
        return tensor

    @property
    def whole(self) -> Source:
        """All tensors of the file, also large ones."""
        return Source(self._file, whole=True)

    def name_of(self, value: Any) -> str | None:
        """The name of the tensor that this one stands for, or None."""
        found = self._names.get(id(value))
        return None if found is None else found[1]


def renamed(saved: Mapping[str, Any], rename: Rename) -> dict[str, Any]:
    """The same under new names.

    Raises:
        CheckpointError: two get the same name
    """
    found: dict[str, Any] = {}
    for name, value in saved.items():
        new = _renamed(name, rename)
        if new in found:
            raise CheckpointError(f"has {name!r}, which rename makes a second {new!r}")
        found[new] = value
    return found


def _renamed(name: str, rename: Rename) -> str:
    for pattern, replacement in rename.items():
        name = re.sub(pattern, replacement, name)
    return name


def checked_optimizer(packed: Any) -> dict[str, Any]:
    kinds = {"rule": str, "params": dict, "groups": list, "state": dict}
    if not isinstance(packed, dict) or not all(
        isinstance(packed.get(key), kind) for key, kind in kinds.items()
    ):
        raise CheckpointError("is damaged: the optimizer in it is none")
    return packed


def state_dict_of(file: File) -> dict[str, Any]:
    """The optimizer's state dict in a file, in torch's layout, with all tensors."""
    packed = checked_optimizer(file.description.get("optimizer"))
    return state_dict_with(packed, Source(file, whole=True), {})


def state_dict_with(packed: Mapping[str, Any], source: Source, rename: Rename) -> dict[str, Any]:
    """What the optimizer's `state_dict()` returned, with new names."""
    groups = [unpack(group, source.whole) for group in packed["groups"]]
    if not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups):
        raise CheckpointError("is damaged: a group lacks its params")
    names = [name for group in groups for name in group["params"]]
    ids = {name: number for number, name in enumerate(names) if isinstance(name, str)}
    if (
        len(ids) != len(names)
        or not ids.keys() == packed["params"].keys() >= packed["state"].keys()
    ):
        raise CheckpointError("is damaged: parameters of the optimizer are listed wrongly")
    new = list(renamed(dict.fromkeys(names), rename))
    for group in groups:
        numbers = [ids[name] for name in group["params"]]
        group.update(params=numbers, param_names=[new[number] for number in numbers])
    others = unpack(packed.get("others", {"dict": []}), source.whole)
    state = {ids[name]: unpack(entry, source) for name, entry in packed["state"].items()}
    return {"state": {**others, **state}, "param_groups": groups}


def kinds(
    optimizer: Optimizer, packed: Mapping[str, Any], rename: Rename, policy: Policy
) -> LoadReport:
    """What differs in rule, and in shape or dtype of parameters, whether they have state or not."""
    found = []
    # a file that was converted does not say
    if packed["rule"] not in ("", rule_of(optimizer)):
        found.append(f"the rule: the file has state of {packed['rule']}, not {rule_of(optimizer)}")
    saved = renamed(packed["params"], rename)
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            shape, dtype = _shape_and_dtype(saved[name]) if name in saved else (None, None)
            own = list(param.shape), str(param.dtype).removeprefix("torch.")
            if shape not in (None, own[0]):
                found.append(f"{name}: has shape {shape} in the file, {own[0]} in the optimizer")
            elif dtype not in (None, own[1]) and policy.dtype == "saved":
                found.append(
                    f"{name}: is {dtype} in the file, {own[1]} in the optimizer (say "
                    "dtype='param', or which dtype its state is to have)"
                )
    return LoadReport(mismatched=tuple(found))


def _shape_and_dtype(recorded: Any) -> tuple[list[int] | None, str | None]:
    if recorded is None:
        return None, None
    try:
        shape, dtype = recorded
        return list(shape), str(dtype)
    except (TypeError, ValueError):
        raise CheckpointError("is damaged: a parameter has no shape and dtype") from None


def targets(loading: Loading, source: Source) -> list[tuple[str, Tensor]]:
    """The tensors that are to be read, and the new ones that they belong into."""
    found = []
    for key, place in loading.matched.params.items():
        saved, fresh = loading.saved.state.get(key, {}), loading.state.get(place.param, {})
        for value, new in _pairs(saved, fresh):
            name = source.name_of(value)
            if name is not None:
                found.append((name, as_real(new)))
    return found


def _pairs(saved: Any, fresh: Any) -> Iterator[tuple[Any, Any]]:
    """What stands in the same place in both, inside of dicts and lists: LBFGS keeps lists."""
    if isinstance(saved, Mapping) and isinstance(fresh, Mapping):
        for key in saved.keys() & fresh.keys():
            yield from _pairs(saved[key], fresh[key])
    elif isinstance(saved, (list, tuple)) and isinstance(fresh, (list, tuple)):
        for one, other in zip(saved, fresh, strict=True):
            yield from _pairs(one, other)
    else:
        yield saved, fresh


def as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
