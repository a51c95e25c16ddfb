"""Older files: modules that read them in a way of their own are asked which names they mean.

torch lets a module rename what it finds in a state dict, in a hook before it loads or in its
`_load_from_state_dict`. Here these run ahead, on a copy of the module without values, so that the
names are known before anything is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from typing import Any

from torch import Tensor, nn

from .names import name_inside
from .states import Source

__all__ = ["as_modules_read"]


def as_modules_read(module: nn.Module, saved: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The state dict after all modules have done with it what they do before they load.

    Where they compute other tensors from those in it, these are read for it, all at once.

    Args:
        module: the whole of the modules
        saved: tensors, with values or without, and other values
        source: where the tensors come from
    """
    readers = [
        (f"{name_inside(module, name)}." if name else "", each)
        for name, each in module.named_modules()
        if _has_a_way_of_its_own(each)
    ]
    read = _read(readers, saved)
    if any(_is_new(value, source) for value in read.values()):
        prefixes = tuple(prefix for prefix, _ in readers)
        filled = {k: source.filled(v) if k.startswith(prefixes) else v for k, v in saved.items()}
        read = _read(readers, filled)
    return read


def _has_a_way_of_its_own(module: nn.Module) -> bool:
    overrides = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    return overrides or bool(module._load_state_dict_pre_hooks)


def _is_new(value: Any, source: Source) -> bool:
    return isinstance(value, Tensor) and value.is_meta and source.name_of(value) is None


def _read(readers: Sequence[tuple[str, nn.Module]], saved: Mapping[str, Any]) -> dict[str, Any]:
    state_dict = dict(saved)
    for prefix, module in readers:
        # whatever it raises, what it has not renamed is reported; torch warns of missing values
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _without_values(module)._load_from_state_dict(state_dict, prefix, {}, True, [], [], [])
    return state_dict


def _without_values(module: nn.Module) -> nn.Module:
    twin = copy(module)
    vars(twin)["_parameters"] = {
        name: None if param is None else nn.Parameter(param.detach().to("meta"), False)
        for name, param in module._parameters.items()
    }
    vars(twin)["_buffers"] = {
        name: None if buffer is None else buffer.detach().to("meta")
        for name, buffer in module._buffers.items()
    }
    return twin
