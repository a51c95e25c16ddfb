"""AdamW and Adam of torchao, in 8 bits, 4 or float8: torch's keys, around tensors of its own.

Tensors of fewer than 4,096 elements, or whose number of elements is no multiple of the block, are
plain ones. Their classes are known to torch's safe reader by name; where torchao is not imported,
one class that does nothing stands for all of them.

Layout: torchao 0.18.0 (BSD-3-Clause), torchao/optim/adam.py, subclass_8bit.py, subclass_4bit.py
and subclass_fp8.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..header import CheckpointError
from .parts import Library, check_keys, count, is_whole, looked_up, moment, number, scaled

__all__ = ["TORCHAO", "stand_ins"]

CLASSES = tuple(
    f"{package}.subclass_{kind.lower()}.OptimState{kind}"
    for package in ("torchao.optim", "torchao.prototype.low_bit_optim")
    for kind in ("8bit", "4bit", "Fp8")
)
"""Its classes of tensors, where they are and where they once were."""

STATE = {"step", "exp_avg", "exp_avg_sq"}


class Inert(Tensor):
    """Stands for a tensor of torchao: holds the parts that were saved, and computes nothing."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> NoReturn:
        raise TypeError(f"{function} of a tensor of torchao, where a plain one must be")


def stand_ins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """For `torch.serialization.safe_globals`: what torchao, if it is imported, did not register.

    Its own classes stay its own for whoever reads a file at the same time.
    """
    known = {
        entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"
        for entry in torch.serialization.get_safe_globals()
    }
    return [(Inert, name) for name in CLASSES if name not in known]


def _is_quantized(value: Any) -> bool:
    return isinstance(value, Tensor) and {"codes", "scale"} <= vars(value).keys()


def _is_one(found: Mapping[str, Any]) -> bool:
    return any(map(_is_quantized, found.values()))


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    # tensors, there, whatever the user gave
    rates = {key: number(group, key, "a group") for key in ("lr", "initial_lr") if key in group}
    return {**group, **rates, "maximize": False}


def _entry(entry: Mapping[str, Any], _: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    check_keys(entry, name, "torchao", STATE, STATE | {"max_exp_avg_sq"})
    moments = {key: _moment(entry[key], f"{name}: {key}") for key in entry if key != "step"}
    return {"step": count(entry, name), **moments}


def _moment(value: Any, what: str) -> Tensor:
    if not _is_quantized(value):
        return moment(value, what)
    parts = vars(value)
    values, shape = _values(parts, what)
    if tuple(value.shape) != shape or math.prod(shape) != values.numel():
        raise CheckpointError(
            f"{what} has shape {tuple(value.shape)}, and {values.numel():,} codes of shape {shape}"
        )
    return scaled(values, parts["scale"], _block(parts, values.numel(), what), what).reshape(shape)


def _values(parts: Mapping[str, Any], what: str) -> tuple[Tensor, tuple[int, ...]]:
    """The numbers that the codes stand for, flat, and the shape that they say they have."""
    codes = parts["codes"]
    if not is_whole(codes):
        raise CheckpointError(f"{what}: codes must be a whole tensor")
    if "_shape" in parts and codes.dtype == torch.uint8:
        # two to a byte, the first in the upper half
        halves = torch.stack((codes >> 4, codes & 15), -1)
        return looked_up(halves, parts.get("qmap"), 16, what), tuple(parts["_shape"])
    if codes.dtype == torch.float8_e4m3fn:
        return codes.float().flatten(), tuple(codes.shape)
    return looked_up(codes, parts.get("qmap"), 256, what), tuple(codes.shape)


def _block(parts: Mapping[str, Any], size: int, what: str) -> int:
    scales = parts["scale"].numel() if is_whole(parts["scale"]) else 0
    block = size // max(scales, 1)
    if not scales or scales * block != size or parts.get("block_size", block) != block:
        raise CheckpointError(f"{what}: {scales:,} scales do not divide {size:,} numbers")
    return block


TORCHAO = Library("quantized state of torchao, read to float32", _is_one, _group, _entry)
