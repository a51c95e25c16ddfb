"""AdamW and Adam of torch-optimi: moments without their bias, and one count for all of a group.

Where torch keeps m_t and divides it by 1 - beta^t in the step, torch-optimi keeps the quotient.
What Kahan's summation holds back for parameters of half precision is let go.

Layout: torch-optimi 0.3.3 (MIT), optimi/adam.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..header import CheckpointError
from .parts import Library, check_keys, count, moment, number

__all__ = ["OPTIMI"]

STATE = {"exp_avg", "exp_avg_sq", "kahan_comp"}
# with gradient_release each parameter knows its group from the start, and its count
RELEASED = STATE | {"group", "step"}

RENAMED = {"beta1", "beta2", "step", "decouple_wd", "decouple_lr", "max_lr"}
DROPPED = {"kahan_sum", "foreach", "triton", "gradient_release", "setup"}
"""Keys of a group that say how a step is run, not what it computes."""


def _is_one(found: Mapping[str, Any]) -> bool:
    return "kahan_comp" in found or {"beta1", "kahan_sum"} <= found.keys()


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in group.items() if key not in RENAMED | DROPPED}
    hyperparameters = {
        "betas": tuple(number(group, beta, "a group") for beta in ("beta1", "beta2")),
        "weight_decay": _decay(group),
        "decoupled_weight_decay": bool(group.get("decouple_wd") or group.get("decouple_lr")),
    }
    return {**kept, **hyperparameters, "amsgrad": False, "maximize": False}


def _decay(group: Mapping[str, Any]) -> float:
    decay = number(group, "weight_decay", "a group")
    if not group.get("decouple_lr"):
        return decay
    largest = number(group, "max_lr", "a group")
    if not largest:
        raise CheckpointError("a group: max_lr must be more than 0 with decouple_lr")
    # a step leaves 1 - lr / max_lr * decay of a weight, where torch's leaves 1 - lr * decay
    return decay / largest


def _entry(entry: Mapping[str, Any], group: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    if entry.keys() <= {"group"}:
        return {}
    check_keys(entry, name, "torch-optimi", STATE, RELEASED)
    steps = count(entry if "step" in entry else group, name)
    moments = {
        key: _biased(moment(entry[key], f"{name}: {key}"), number(group, beta, name), float(steps))
        for key, beta in (("exp_avg", "beta1"), ("exp_avg_sq", "beta2"))
    }
    return {"step": steps, **moments}


def _biased(value: Tensor, beta: float, steps: float) -> Tensor:
    # in float64, to round once
    exact: Tensor = value.double() * (1 - beta**steps)
    return exact.to(value.dtype)


OPTIMI = Library("state of torch-optimi, read to float32", _is_one, _group, _entry)
