"""State dicts of AdamW from other libraries, brought to torch's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..header import CheckpointError
from .bitsandbytes import BITSANDBYTES
from .optimi import OPTIMI
from .torchao import TORCHAO
from .torchao import stand_ins as stand_ins

LIBRARIES = (BITSANDBYTES, TORCHAO, OPTIMI)


def in_layout_of_torch(
    state_dict: Mapping[str, Any], params: Mapping[str, Tensor | None]
) -> tuple[Mapping[str, Any], str | None]:
    """A state dict as torch's AdamW would have it, and whose it is if not torch's.

    A library is known by the keys of its state and of its groups. Moments become float32, unless
    they are float64.

    Args:
        state_dict: with names in every group
        params: the parameters by name, or None for one that is not known

    Raises:
        CheckpointError: it is of another library, but not as its AdamW leaves it
    """
    groups, state = state_dict["param_groups"], state_dict["state"]
    found = [*groups, *(entry for entry in state.values() if isinstance(entry, Mapping))]
    library = next((each for each in LIBRARIES if any(map(each.is_one, found))), None)
    if library is None:
        return state_dict, None
    translated = [library.group(group) for group in groups]
    read = dict(state)
    for group in groups:
        for key, name in zip(group["params"], group["param_names"], strict=True):
            if key in state:
                read[key] = library.entry(_mapping(state[key], name), group, name)
                _check(read[key], params[name], name)
    return {"state": read, "param_groups": translated}, library.said


def _mapping(entry: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{name}: state must be a dict, got {type(entry).__name__}")
    return entry


def _check(entry: Mapping[str, Tensor], param: Tensor | None, name: str) -> None:
    moments = {key: value for key, value in entry.items() if key != "step"}
    shapes = {tuple(value.shape) for value in (*moments.values(), param) if value is not None}
    if len(shapes) > 1:
        raise CheckpointError(f"{name}: parameter and moments have shapes {sorted(shapes)}")
    if any(key.endswith("_sq") and bool((moments[key] < 0).any()) for key in moments):
        raise CheckpointError(f"{name}: a mean of squares is negative")
