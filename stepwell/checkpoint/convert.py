"""convert: files of torch become checkpoints, and the other way round.

A file of torch is a pickle. It is read by torch's own reader of tensors and plain values
(`weights_only=True`), which executes nothing; it is written so that this reader takes it. What
other libraries save is such a file too.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..state_dict import read
from .contents import header_of, packed_optimizer
from .foreign import in_layout_of_torch, stand_ins
from .header import CheckpointError, is_of_torch
from .layouts import parts_of
from .reading import File, opened
from .replacing import replacing
from .saving import Writing
from .states import Source, state_dict_of
from .values import Packer, unpack

__all__ = ["convert", "from_torch", "to_torch"]

PARTS = ("model", "averaged", "scheduler", "extra")
UNSAFE = re.compile(r"(?:GLOBAL|[Uu]nsupported class) ([A-Za-z_][\w.]*)")
"""How torch says that a file asks for something that is no tensor or plain value."""

REPEATS, SPARE = 16, 1 << 26
"""How often the bytes of a file may be repeated in what is made of it, and bytes beyond that."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    optimizer: str | None = None,
    scheduler: str | None = None,
) -> str | None:
    """Make a file of torch of a checkpoint, or a checkpoint of a file of torch.

    Args:
        source: the file that is read
        target: the file that is written
        names: those of the parameters, in the optimizer's order, where a file of torch has none
        optimizer, scheduler: where in a file of torch with several the one is that is taken, such
            as "optimizer_states.1"

    Returns:
        what a user has to know, in words: what of another library was read, and which optimizers
        and schedules have become `extra`; or None

    Raises:
        CheckpointError: the source is damaged, or nothing that could be converted
        OSError: it cannot be read, or the target not be written
    """
    try:
        with opened(source) as file:
            file.check(file.header.entries)
            content = _content(file)
    except CheckpointError as refused:
        found = _torch_file(Path(source), refused)
    else:
        _save_for_torch(content, Path(target))
        return None
    try:
        return from_torch(found, target, names, optimizer=optimizer, scheduler=scheduler)
    except CheckpointError as error:
        raise CheckpointError(f"{Path(source)} {error}") from error.__cause__


def _torch_file(path: Path, refused: CheckpointError) -> Any:
    try:
        with torch.serialization.safe_globals(stand_ins()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # its reader raises whatever comes up in the middle of a broken file
        raise CheckpointError(_words(path, refused, error)) from error


def _words(path: Path, refused: CheckpointError, error: Exception) -> str:
    """Why a file cannot be converted, by what torch's reader said of it."""
    with path.open("rb") as file:
        if not is_of_torch(file.read(4)):
            return f"{refused}; and no file of torch"
    found = UNSAFE.search(str(error))
    if found is not None:
        return (
            f"{path} holds {found[1]}, which only code in the file could load. If you trust the "
            "file, read it with torch.load(path, weights_only=False), and give the state dicts in "
            'it to stepwell.checkpoint.from_torch({"model": ..., "optimizer": ...}, target)'
        )
    if "torch.jit.load" in str(error):
        return f"{path} is an archive of torch.jit.save, which holds code, and no training"
    return f"{path} is damaged, or no file of torch.save: torch cannot read it"


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
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # its writer reports a full disk as one
            raise OSError(errno.EIO, f"torch.save: {error}") from error


def from_torch(
    content: Any,
    target: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    optimizer: str | None = None,
    scheduler: str | None = None,
) -> str | None:
    """Write a checkpoint of what `torch.load` gave.

    Args:
        content: an optimizer's state dict, or a dict that holds one and perhaps the model's
        target: the file
        names: those of the parameters, in the optimizer's order, unless its groups have them
        optimizer, scheduler: where the one is that is taken, as for `convert`

    Returns:
        what a user has to know, as `convert` does

    Raises:
        CheckpointError: there is no optimizer in it, names are missing, or something in it is
            nothing that a checkpoint could hold
        OSError: the file cannot be written
    """
    with _refusing():
        packer = Packer()
        parts = parts_of(content, {"optimizer": optimizer, "scheduler": scheduler})
        description, said = _description(packer, parts.found, names)
        _check_size(packer.tensors.values())
        Writing(Path(target), packer.tensors, {**header_of(), **description}, None).run()
    left = f"{', '.join(parts.left)}: kept as extra" if parts.left else None
    return "; ".join(filter(None, (said, left))) or None


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    # a file of torch may hold anything anywhere, itself included
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(f"cannot be converted: {error!s:.300}") from error


def _description(
    packer: Packer, parts: dict[str, Any], names: Sequence[str] | None
) -> tuple[dict[str, Any], str | None]:
    """What the header says of these parts, and what of another library is among them."""
    others = {part: packer.pack(parts[part], part) for part in parts if part != "optimizer"}
    if "optimizer" not in parts:
        return others, None
    named = _named(parts["optimizer"], names)
    params = _params(named, parts.get("model"))
    state_dict, said = in_layout_of_torch(named, params)
    return {**others, "optimizer": packed_optimizer(packer, state_dict, params, rule="")}, said


def _params(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor | None]:
    """The parameters by name, as far as there is a model that has them."""
    known = model if isinstance(model, Mapping) else {}
    found = {name: known.get(name) for g in state_dict["param_groups"] for name in g["param_names"]}
    return {name: p if isinstance(p, Tensor) else None for name, p in found.items()}


def _check_size(tensors: Iterable[Tensor]) -> None:
    """Refuse what would become much larger than the file is, by elements that repeat."""
    listed = list(tensors)
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in listed}
    claimed, held = sum(t.numel() * t.element_size() for t in listed), sum(memory.values())
    if claimed > REPEATS * held + SPARE:
        raise CheckpointError(f"claims {claimed:,} bytes of tensors, and holds {held:,}")


def _named(state_dict: Any, names: Sequence[str] | None) -> dict[str, Any]:
    """The state dict with the names of all parameters."""
    saved = read(state_dict, "its optimizer")
    count = sum(len(group["params"]) for group in saved.groups)
    if names is not None and len(names) != count:
        raise CheckpointError(f"has {count} parameters, and {len(names)} names are given")
    left = iter(names or ())
    for group in saved.groups:
        if names is not None:
            group["param_names"] = [next(left) for _ in group["params"]]
        if len(group.get("param_names", ())) != len(group["params"]):
            raise CheckpointError(
                "does not name its parameters: give the names, those of "
                "model.named_parameters() in the order in which the optimizer has them, with "
                "names=[...], or on the command line with --names FILE, one to a line"
            )
    return {"state": saved.state, "param_groups": saved.groups}
