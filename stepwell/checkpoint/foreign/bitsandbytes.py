"""AdamW and Adam of bitsandbytes, in 8 bits or 32, paged or not: one layout.

Its Adam shrinks weights as its AdamW does. Tensors of fewer than 4,096 elements keep float32.

Layout: bitsandbytes 0.50.2 (MIT), bitsandbytes/optim/optimizer.py, Optimizer2State.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..header import CheckpointError
from .parts import Library, check_keys, count, is_whole, looked_up, moment, scaled

__all__ = ["BITSANDBYTES"]

WRAPPED = "__bnb_optimizer_quant_state__"
"""Under this key a state dict has what earlier versions had in its place."""

PLAIN = {"step", "state1", "state2"}
QUANTIZED = PLAIN | {"qmap1", "absmax1", "qmap2", "absmax2"}

BLOCKS = (256, 2048)
"""Elements to a block, and what they were in earlier versions."""

MIXED = {"alpha": (0, None), "t_alpha": (None,), "t_beta3": (None,)}
"""Hyperparameters of its AdEMAMix, which all groups have, and their values where it is not it."""


def _is_one(found: Mapping[str, Any]) -> bool:
    return WRAPPED in found or "state1" in found


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    if any(group.get(key) not in values for key, values in MIXED.items()):
        raise CheckpointError("has state of AdEMAMix of bitsandbytes, not of AdamW")
    kept = {key: value for key, value in group.items() if key not in MIXED}
    return {**kept, "amsgrad": False, "maximize": False, "decoupled_weight_decay": True}


def _entry(entry: Mapping[str, Any], _: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    wrapped = entry.get(WRAPPED)
    parts = {key: value for key, value in entry.items() if key != WRAPPED}
    parts |= wrapped if isinstance(wrapped, Mapping) else {}
    check_keys(parts, name, "bitsandbytes", PLAIN, QUANTIZED)
    return {
        "step": count(parts, name),
        "exp_avg": _moment(parts, "1", name),
        "exp_avg_sq": _moment(parts, "2", name),
    }


def _moment(parts: Mapping[str, Any], which: str, name: str) -> Tensor:
    codes, what = parts[f"state{which}"], f"{name}: state{which}"
    if is_whole(codes) and not codes.is_contiguous():
        # its kernels for GPUs go by memory, those for CPUs by index
        raise CheckpointError(f"{what} lies in another order of memory than that of its indices")
    if f"absmax{which}" not in parts:
        return moment(codes, what)
    scales = parts[f"absmax{which}"]
    values = looked_up(codes, parts[f"qmap{which}"], 256, what)
    given = scales.numel() if isinstance(scales, Tensor) else 0
    block = next((b for b in BLOCKS if -(-values.numel() // b) == given), BLOCKS[0])
    return scaled(values, scales, block, what).reshape(codes.shape)


BITSANDBYTES = Library("state of bitsandbytes, read to float32", _is_one, _group, _entry)
