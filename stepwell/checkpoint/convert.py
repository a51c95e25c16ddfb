"""convert: files of torch become checkpoints, and the other way round.

A file of torch is a pickle. It is read by torch's own reader of tensors and plain values
(`weights_only=True`), which executes nothing; it is written so that this reader takes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contents import header_of, packed_optimizer
from .header import CheckpointError
from .reading import File, opened
from .saving import Writing
from .states import Source, state_dict_of
from .values import Packer, unpack
from .writing import replacing

__all__ = ["convert", "from_torch", "to_torch"]

PARTS = ("model", "averaged", "scheduler", "extra")
SPELLINGS = {
    "optimizer": ("optimizer", "optimizer_state_dict", "optim", "opt"),
    "model": ("model", "model_state_dict", "state_dict"),
    "scheduler": ("scheduler", "scheduler_state_dict", "lr_scheduler"),
}
"""Under which keys people save what, after the examples in torch's documentation."""

StateDict = Mapping[str, Any]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    names: Sequence[str] | None = None,
) -> None:
    """Make a file of torch of a checkpoint, or a checkpoint of a file of torch.

    Raises:
        CheckpointError: the source is damaged, or nothing that could be converted
        OSError: it cannot be read, or the target not be written
    """
    try:
        with opened(source) as file:
            file.check(file.header.entries)
            content = _content(file)
    except CheckpointError as refused:
        from_torch(_torch_file(Path(source), refused), target, names)
    else:
        _save_for_torch(content, Path(target))


def _torch_file(path: Path, refused: CheckpointError) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # its reader raises whatever comes up in the middle of a broken file
        raise CheckpointError(f"{refused}; and no file of torch: {error!r:.300}") from error


def to_torch(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint holds, with the optimizer's state dict in torch's layout.

    Raises:
        CheckpointError: it is damaged
        OSError: it cannot be read
    """
    with opened(path) as file:
        return _content(file)


def _content(file: File) -> dict[str, Any]:
    source = Source(file, whole=True)
    found = {key: unpack(file.description[key], source) for key in PARTS if key in file.description}
    if "optimizer" in file.description:
        found["optimizer"] = state_dict_of(file)
    return found


def _save_for_torch(content: dict[str, Any], target: Path) -> None:
    with replacing(target) as fd, os.fdopen(os.dup(fd), "wb") as file:
        torch.save(content, file)


def from_torch(
    content: Any, target: str | os.PathLike[str], names: Sequence[str] | None = None
) -> None:
    """Write a checkpoint of what `torch.load` gave.

    Args:
        content: an optimizer's state dict, or a dict that holds one and perhaps the model's
        target: the file
        names: those of the parameters, in the optimizer's order, unless its groups have them

    Raises:
        CheckpointError: there is no optimizer in it, or names are missing
        OSError: the file cannot be written
    """
    parts = _parts(content)
    packer = Packer()
    model = parts.pop("model", None)
    description = {} if model is None else {"model": packer.pack(model, "model")}
    description |= {key: packer.pack(parts[key], key) for key in parts if key != "optimizer"}
    if "optimizer" in parts:
        state_dict = _named(parts["optimizer"], names)
        known = model if isinstance(model, Mapping) else {}
        params = {n: known.get(n) for g in state_dict["param_groups"] for n in g["param_names"]}
        description["optimizer"] = packed_optimizer(packer, state_dict, params, rule="")
    Writing(Path(target), packer.tensors, {**header_of(), **description}, None).run()


def _parts(content: Any) -> dict[str, Any]:
    if _is_optimizers(content):
        return {"optimizer": content}
    if not isinstance(content, Mapping):
        raise CheckpointError(f"holds a {type(content).__name__}, no state dicts")
    found = {
        part: content[key] for part, keys in SPELLINGS.items() for key in keys if key in content
    }
    if found:
        used = {key for keys in SPELLINGS.values() for key in keys}
        extra = {key: value for key, value in content.items() if key not in used}
        return {**found, **({"extra": extra} if extra else {})}
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {"model": content}
    raise CheckpointError("holds neither the state dict of an optimizer nor that of a model")


def _is_optimizers(content: Any) -> bool:
    return isinstance(content, Mapping) and {"state", "param_groups"} <= content.keys()


def _named(state_dict: Any, names: Sequence[str] | None) -> dict[str, Any]:
    """The state dict with the names of all parameters."""
    if not _is_optimizers(state_dict):
        raise CheckpointError("holds an optimizer that is no state dict")
    groups = [dict(group) for group in state_dict["param_groups"]]
    count = sum(len(group["params"]) for group in groups)
    if names is not None and len(names) != count:
        raise CheckpointError(f"has {count} parameters, and {len(names)} names are given")
    left = iter(names or ())
    for group in groups:
        if names is not None:
            group["param_names"] = [next(left) for _ in group["params"]]
        if len(group.get("param_names", ())) != len(group["params"]):
            raise CheckpointError(
                "does not name its parameters: give the names, those of "
                "model.named_parameters() in the order in which the optimizer has them"
            )
    return {"state": state_dict["state"], "param_groups": groups}
