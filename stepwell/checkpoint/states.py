"""The optimizer in a file: its state dict in torch's layout, and what it is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..optimizer import Optimizer
from ..state_dict import Loading, Policy
from .header import CheckpointError
from .reading import File
from .values import unpack

__all__ = [
    "SMALL",
    "Source",
    "as_real",
    "checked_optimizer",
    "kinds",
    "restorer",
    "state_dict_of",
    "state_dict_with",
    "targets",
]

SMALL = 1 << 16
"""Up to so many bytes, a tensor is read before it is known where it goes."""


class Source:
    """The tensors of a file as they are asked for: small ones, and stand-ins for large ones.

    A name that is asked for twice gives one tensor.
    """

    def __init__(self, file: File, *, whole: bool = False) -> None:
        self._file = file
        self._whole = whole
        self._made: dict[tuple[str, bool], Tensor] = {}
        self._names: dict[int, str] = {}

    def __call__(self, name: str, is_complex: bool) -> Tensor:
        self._file.require(name)
        if (name, is_complex) not in self._made:
            made = self._make(name, is_complex)
            self._made[name, is_complex] = made
            self._names[id(made)] = name
        return self._made[name, is_complex]

    def _make(self, name: str, is_complex: bool) -> Tensor:
        is_small = self._file.num_bytes(name) <= SMALL
        tensor = self._file.tensor(name) if self._whole or is_small else self._file.like(name)
        return torch.view_as_complex(tensor) if is_complex else tensor

    def name_of(self, value: Any) -> str | None:
        """The name of the tensor that this one stands for, or None if it has values itself."""
        return self._names.get(id(value)) if isinstance(value, Tensor) and value.is_meta else None

    def filled(self, value: Any) -> Any:
        """The value with all tensors in it, which are read."""
        name = self.name_of(value)
        if name is not None:
            tensor = self._file.tensor(name)
            return torch.view_as_complex(tensor) if value.is_complex() else tensor
        if isinstance(value, dict):
            return type(value)({key: self.filled(item) for key, item in value.items()})
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.filled, value))
        return value

    def are_alike(self, one: Tensor, other: Tensor) -> bool:
        """Whether two tensors of the file, of one shape, are the same to the bit."""
        names = [self._names.get(id(tensor)) for tensor in (one, other)]
        if one.dtype != other.dtype:
            return False
        if None in names:
            return torch.equal(self.filled(one), self.filled(other))
        digests = [self._file.digest(str(name)) for name in names]
        return bool(digests[0] == digests[1])


def checked_optimizer(packed: Any) -> dict[str, Any]:
    """What is in a file under "optimizer".

    Raises:
        CheckpointError: it is something else
    """
    kinds = {"rule": str, "params": dict, "groups": list, "state": dict}
    if not isinstance(packed, dict) or not all(
        isinstance(packed.get(key), kind) for key, kind in kinds.items()
    ):
        raise CheckpointError("is damaged: the optimizer in it is none")
    dicts = [*packed["groups"], *packed["state"].values(), packed.get("others", {"dict": []})]
    if not all(isinstance(each, dict) and each.keys() == {"dict"} for each in dicts):
        raise CheckpointError("is damaged: groups and state of the optimizer must be dicts")
    return packed


def state_dict_of(file: File) -> dict[str, Any]:
    """The optimizer's state dict in a file, in torch's layout, with all tensors."""
    packed = checked_optimizer(file.description.get("optimizer"))
    return state_dict_with(
        packed, Source(file, whole=True), {name: name for name in packed["params"]}
    )


def state_dict_with(
    packed: Mapping[str, Any], source: Source, names: Mapping[str, str]
) -> dict[str, Any]:
    """What the optimizer's `state_dict()` returned, with new names.

    Raises:
        CheckpointError: it is damaged
    """
    groups = [source.filled(unpack(group, source)) for group in packed["groups"]]
    if not all(isinstance(group.get("params"), list) for group in groups):
        raise CheckpointError("is damaged: a group lacks its params")
    listed = [name for group in groups for name in group["params"]]
    ids = {name: number for number, name in enumerate(listed) if isinstance(name, str)}
    if (
        len(ids) != len(listed)
        or not ids.keys() == packed["params"].keys() >= packed["state"].keys()
    ):
        raise CheckpointError("is damaged: parameters of the optimizer are listed wrongly")
    for group in groups:
        own = group["params"]
        group.update(params=[ids[name] for name in own], param_names=[names[name] for name in own])
    others = source.filled(unpack(packed.get("others", {"dict": []}), source))
    state = {ids[name]: unpack(entry, source) for name, entry in packed["state"].items()}
    return {"state": {**others, **state}, "param_groups": groups}


def kinds(
    optimizer: Optimizer, packed: Mapping[str, Any], names: Mapping[str, str], policy: Policy
) -> dict[str, str]:
    """By name, what is wrong with parameters of the optimizer, whether they have state or not.

    They are on the meta device, or of another shape or dtype than in the file.
    """
    found = {}
    saved = {names[name]: recorded for name, recorded in packed["params"].items()}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            problem = _problem(param, saved[name], policy) if name in saved else None
            if problem is not None:
                found[name] = f"{name}: {problem}"
    return found


def _problem(param: Tensor, recorded: Any, policy: Policy) -> str | None:
    shape, dtype = _shape_and_dtype(recorded)
    own = list(param.shape), str(param.dtype).removeprefix("torch.")
    if param.is_meta:
        return (
            "is on the meta device, which has no memory: call to_empty(device=...) of the model "
            "before the optimizer is made"
        )
    if shape not in (None, own[0]):
        return f"has shape {shape} in the file, {own[0]} in the optimizer"
    if dtype not in (None, own[1]) and policy.dtype == "saved":
        return (
            f"is {dtype} in the file, {own[1]} in the optimizer (say dtype='param', or which "
            "dtype its state is to have)"
        )
    return None


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
    return [
        (name, as_real(fresh))
        for key, place in loading.matched.params.items()
        for name, fresh in _stand_ins(
            loading.saved.state.get(key), loading.state.get(place.param), source
        )
    ]


def _stand_ins(saved: Any, fresh: Any, source: Source) -> Iterator[tuple[str, Tensor]]:
    """The names of tensors, and what has been made for each of them at the same place."""
    name = source.name_of(saved)
    if name is not None and isinstance(fresh, Tensor):
        yield name, fresh
    elif isinstance(saved, Mapping) and isinstance(fresh, Mapping):
        for key in saved:
            yield from _stand_ins(saved[key], fresh.get(key), source)
    elif isinstance(saved, (list, tuple)) and isinstance(fresh, (list, tuple)):
        for pair in zip(saved, fresh, strict=False):
            yield from _stand_ins(*pair, source)


def restorer(optimizer: Optimizer) -> Callable[[], None]:
    """What gives an optimizer its present state and groups back."""
    own, state = dict(vars(optimizer)), dict(optimizer.state)
    groups = [(group, dict(group)) for group in optimizer.param_groups]

    def restore() -> None:
        vars(optimizer).clear()
        vars(optimizer).update(own, _held=None)
        optimizer.param_groups[:] = [group for group, _ in groups]
        for group, kept in groups:
            dict.clear(group)
            dict.update(group, kept)
        optimizer.state.clear()
        optimizer.state.update(state)

    return restore


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as files have it."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
