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

from ..matching import shown
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
"""Torch's message about a file that asks for something other than a tensor or plain value."""

SUFFIX = ".safetensors"

LISTED = 20
"""Largest number of entries of `extra` that are named."""

REPEATS, SPARE = 16, 1 << 26
"""How often the bytes of a file may be repeated in what is made of it, and bytes beyond that."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    optimizer: str | None = None,
    scheduler: str | None = None,
) -> str:
    """Make a file of torch of a checkpoint, or a checkpoint of a file of torch.

    Args:
        source: the file that is read
        target: the file that is written; not the source, and no .safetensors for a file of torch
        names: those of the parameters, in the optimizer's order, group after group, where a file
            of torch has none
        optimizer, scheduler: where in a file of torch with several the one is that is taken, such
            as "optimizer_states.1"

    Returns:
        in words which of the two was made and with which parts, what of another library was read,
        and what has become `extra`

    Raises:
        CheckpointError: the source is damaged, or nothing that could be converted; it has other
            names than those given; or the target must not be written
        OSError: it cannot be read, or the target not be written
    """
    _check_apart(Path(source), Path(target))
    try:
        with opened(source) as file:
            file.check(file.header.entries)
            content, has_random = _content(file), "random" in file.description
    except CheckpointError as refused:
        found = _torch_file(Path(source), refused)
    else:
        _save_for_torch(content, Path(target))
        left = "; without the states of random number generators" if has_random else ""
        return f"a file of torch.save with {', '.join(content) or 'nothing'}{left}"
    try:
        return from_torch(found, target, names, optimizer=optimizer, scheduler=scheduler)
    except CheckpointError as error:
        raise CheckpointError(f"{Path(source)} {error}") from error.__cause__


def _check_apart(source: Path, target: Path) -> None:
    """Check that the source is not what would be overwritten, whatever name it goes by."""
    if source.exists() and target.exists() and source.samefile(target):
        raise CheckpointError(f"{target} is {source} itself: give the target another name")


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
    # a link is followed, so what it leads to counts as well
    if SUFFIX in (target.suffix.lower(), Path(os.path.realpath(target)).suffix.lower()):
        raise CheckpointError(
            f"{target}: the source is a checkpoint, of which a file of torch.save is made, and "
            f"that is no {SUFFIX} file: give the target another name, such as "
            f"{target.with_suffix('.pt').name}"
        )
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
) -> str:
    """Write a checkpoint of what `torch.load` gave.

    Args:
        content: an optimizer's state dict, or a dict that holds one and perhaps the model's
        target: the file
        names: those of the parameters, in the optimizer's order, group after group, unless its
            groups have them
        optimizer, scheduler: where the one is that is taken, as for `convert`

    Returns:
        what was made of what, as `convert` does

    Raises:
        CheckpointError: there is no optimizer in it, names are missing or not its own, or
            something in it is nothing that a checkpoint could hold
        OSError: the file cannot be written
    """
    with _refusing():
        packer = Packer()
        parts = parts_of(content, {"optimizer": optimizer, "scheduler": scheduler})
        description, said = _description(packer, parts.found, names)
        _check_size(packer.tensors.values())
        Writing(Path(target), packer.tensors, {**header_of(), **description}, None).run()
    found = ", ".join(part for part in parts.found if part != "extra")
    left = f"{', '.join(shown(parts.left, LISTED))}: kept as extra" if parts.left else None
    return "; ".join(filter(None, (f"a checkpoint with {found}", *said, left)))


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
) -> tuple[dict[str, Any], list[str | None]]:
    """Return the header's entries for these parts, and the user's notes on the optimizer."""
    others = {part: packer.pack(parts[part], part) for part in parts if part != "optimizer"}
    if "optimizer" not in parts:
        return others, []
    named, said = _named(parts["optimizer"], names)
    params = _params(named, parts.get("model"))
    state_dict, library = in_layout_of_torch(named, params)
    packed = packed_optimizer(packer, state_dict, params, rule="")
    return {**others, "optimizer": packed}, [library, said]


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


def _named(state_dict: Any, names: Sequence[str] | None) -> tuple[dict[str, Any], str | None]:
    """The state dict with the names of all parameters, and what to say of those given."""
    saved = read(state_dict, "its optimizer")
    own = [name for group in saved.groups for name in _own_names(group)]
    if names is not None:
        _check_given(own, names)
    elif None in own:
        count = len(saved.groups)
        raise CheckpointError(
            "does not name its parameters: give the names in the order of the optimizer, "
            f"{f'group after group (it has {count}), ' if count > 1 else ''}which need not be "
            "that of model.named_parameters(), with names=[...], or on the command line with "
            "--names FILE, one to a line"
        )
    left = iter(own if names is None else names)
    for group in saved.groups:
        group["param_names"] = [next(left) for _ in group["params"]]
    said = None
    if None in own and len(saved.groups) > 1:
        count = len(saved.groups)
        said = f"names given to its {count} groups one after the other, in the optimizer's order"
    return {"state": saved.state, "param_groups": saved.groups}, said


def _own_names(group: Mapping[str, Any]) -> Sequence[Any]:
    """The names that a saved group has itself, or None for each parameter."""
    names = group.get("param_names")
    return names if names and len(names) == len(group["params"]) else [None] * len(group["params"])


def _check_given(own: Sequence[Any], names: Sequence[str]) -> None:
    """Refuse names that are not those which the file has itself.

    Where these repeat, as those of two models in one optimizer, they may be given with prefixes.
    """
    if len(names) != len(own):
        raise CheckpointError(f"has {len(own)} parameters, and {len(names)} names are given")
    known = [name for name in own if name is not None]
    pairs = zip(own, names, strict=True)
    differing = [(mine, given) for mine, given in pairs if mine is not None and mine != given]
    repeat = len(set(known)) < len(known)
    if not differing or (repeat and all(given.endswith(f".{mine}") for mine, given in differing)):
        return
    how = "in another order than" if {*known} == {*names} else "by other names than"
    mine, given = differing[0]
    raise CheckpointError(
        f"names its parameters itself, {how} --names or names=, which has {given!r:.80} "
        f"for its {mine!r:.80}: leave out the names"
    )
