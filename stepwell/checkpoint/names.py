"""Names: which saved one means which of a training's, with wrappers and ties on either side."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..groups.naming import is_inner, plain_name
from .header import CheckpointError

__all__ = [
    "Rename",
    "Rules",
    "aliases",
    "checked_rename",
    "matched_names",
    "name_inside",
    "names_inside",
]

Rename = Mapping[str, str]
Rules = Sequence[tuple[re.Pattern[str], str]]

PARALLEL = "module."
"""What DistributedDataParallel puts in front of all names."""


def names_inside(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """For each name of a parameter, buffer or the like, the one without what wrappers put into it.

    Wrappers may be anywhere in the module; `torch.compile`, say, of a part of it.
    """
    found = {name: name_inside(module, name) for name in names}
    # a module may have both; then they must be told apart
    return found if len({*found.values()}) == len(found) else {name: name for name in found}


def name_inside(module: nn.Module | None, name: str) -> str:
    """The name, of anything in this module, without what wrappers put into it."""
    kept = []
    for part in name.split("."):
        if module is None or not is_inner(module, part):
            kept.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(kept)


def aliases(model: nn.Module) -> dict[int, list[str]]:
    """All the names of each parameter, by its identity; tied ones have several."""
    named = list(model.named_parameters(remove_duplicate=False))
    inside = names_inside(model, (name for name, _ in named))
    found: dict[int, list[str]] = {}
    for name, param in named:
        found.setdefault(id(param), []).append(inside[name])
    return found


def ties(packed: Any, rename: Rules) -> list[list[str]]:
    """The names, after renaming, that mean one tensor in a state dict as a file has it."""
    found: dict[str, list[str]] = {}
    pairs = packed.get("dict") if isinstance(packed, dict) else None
    for pair in pairs if isinstance(pairs, list) else ():
        match pair:
            case [str(name), {"tensor": str(tensor)}]:
                found.setdefault(tensor, []).append(renamed(plain_name(name), rename))
    return [names for names in found.values() if len(names) > 1]


def checked_rename(rename: Any) -> Rules:
    """The patterns and replacements that a user has given.

    Raises:
        TypeError, ValueError: they are none
    """
    if rename is None:
        return []
    if not isinstance(rename, Mapping):
        raise TypeError(
            "load: rename must be a dict of regular expressions and what their matches are "
            f"replaced with, got {type(rename).__name__}"
        )
    return [_rule(pattern, replacement) for pattern, replacement in rename.items()]


def _rule(pattern: Any, replacement: Any) -> tuple[re.Pattern[str], str]:
    if not isinstance(pattern, str) or not isinstance(replacement, str):
        raise TypeError(f"load: rename must hold texts, got {pattern!r}: {replacement!r}")
    try:
        compiled = re.compile(pattern)
        # what also matches nothing shows whether the replacement names groups that there are
        re.compile(f"{pattern}|").sub(replacement, "")
    except (re.error, IndexError) as error:
        raise ValueError(f"load: rename has {pattern!r}: {replacement!r}: {error}") from None
    return compiled, replacement


def matched_names(
    saved: Iterable[str], rename: Rules, own: Collection[str], tied: Iterable[Collection[str]] = ()
) -> dict[str, str]:
    """What each saved name means among a training's own: renamed, unwrapped, or tied to it.

    Args:
        saved: the names in the file
        rename: what their user wants them to be
        own: the names in the training
        tied: names, after renaming, that mean one tensor, in the file or in the training

    Raises:
        CheckpointError: two mean the same
    """
    names = {name: plain_name(name) for name in saved}
    if len({*names.values()}) < len(names):
        names = {name: name for name in names}
    names = {name: renamed(inside, rename) for name, inside in names.items()}
    _check_unique(names)
    return _with_ties(_with_prefix(names, own), own, tied)


def renamed(name: str, rename: Rules) -> str:
    """The name in which all matches are replaced at once, so that two names can be swapped."""
    made, start = "", 0
    while start <= len(name):
        hits = [(pattern.search(name, start), text) for pattern, text in rename]
        found = [(hit, text) for hit, text in hits if hit is not None]
        if not found:
            break
        hit, text = min(found, key=lambda pair: pair[0].start())
        made += name[start : hit.start()] + hit.expand(text)
        start = hit.end()
        if hit.start() == hit.end():
            # after a match of nothing, a letter passes
            made += name[start : start + 1]
            start += 1
    return made + name[start:]


def _check_unique(names: Mapping[str, str]) -> None:
    first: dict[str, str] = {}
    for name, new in names.items():
        if first.setdefault(new, name) != name:
            raise CheckpointError(f"has {name!r}, which rename makes a second {new!r}")


def _with_prefix(names: Mapping[str, str], own: Collection[str]) -> dict[str, str]:
    """With or without what DistributedDataParallel puts in front, if one side alone has it."""
    theirs, ours = ({name.startswith(PARALLEL) for name in side} for side in (names.values(), own))
    if theirs == {True} and ours == {False}:
        return {name: new.removeprefix(PARALLEL) for name, new in names.items()}
    if theirs == {False} and ours == {True}:
        return {name: PARALLEL + new for name, new in names.items()}
    return dict(names)


def _with_ties(
    names: dict[str, str], own: Collection[str], tied: Iterable[Collection[str]]
) -> dict[str, str]:
    """With the training's own names of what the file knows by another name of the same tensor."""
    same: dict[str, list[str]] = {}
    for together in tied:
        for name in together:
            same.setdefault(name, []).extend(together)
    taken = {*names.values()}
    for name, new in names.items():
        if new not in own:
            free = [other for other in same.get(new, ()) if other in own and other not in taken]
            if free:
                names[name] = free[0]
                taken.add(free[0])
    return names
