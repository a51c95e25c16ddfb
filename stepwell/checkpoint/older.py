"""Older files: modules that read them in a way of their own are asked which names they mean.

torch lets a module rename what it finds in a state dict, in a hook before it loads or in its
`_load_from_state_dict`. Here these run ahead, on a copy of the module without large values, so
that the names are known before anything is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .names import name_inside
from .states import SMALL, Source

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
            _mostly_blank(module)._load_from_state_dict(state_dict, prefix, {}, True, [], [], [])
    return state_dict


def _mostly_blank(module: nn.Module) -> nn.Module:
    """A copy whose tensors can be written to; large ones have no values."""
    twin = copy(module)
    for kind in ("_parameters", "_buffers"):
        tensors = {name: _blank(tensor) for name, tensor in vars(module)[kind].items()}
        vars(twin)[kind] = tensors
    return twin


def _blank(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or is_lazy(tensor):
        return tensor
    is_small = tensor.numel() * tensor.element_size() <= SMALL
    blank = tensor.detach().clone() if is_small else tensor.detach().to("meta")
    return nn.Parameter(blank, False) if isinstance(tensor, nn.Parameter) else blank
