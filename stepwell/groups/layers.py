"""The layers of a model, in order: blocks, and modules that hold a matrix outside of them."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from itertools import pairwise

from torch import nn

from .kinds import is_embedding, is_plain_weight
from .naming import Named, Use, unwrapped

__all__ = ["Blocks", "is_in_block", "layers_of"]

Blocks = re.Pattern[str] | None

# a name up to its first number: layers.0
NUMBERED = re.compile(r"^(?:.*?\.)?\d+(?=\.)")


def layers_of(members: Iterable[Named], blocks: Blocks = None) -> list[list[Named]]:
    """Parameters in the order of the model, cut into layers.

    A block is a child of the outermost list of modules of one class, as a layer of a transformer,
    or, with `blocks`, what has the same match in its names. Each is a layer. Outside of blocks a
    layer begins with each module that has a matrix of weights; the embeddings before it, and the
    vectors around it, belong to it.
    """
    layers: list[list[Named]] = []
    block: Hashable = None
    owner: str | None = None
    for named in members:
        use = named.uses[0]
        key = block_of(use, blocks)
        begins = key is None and is_plain_weight(named)
        if not layers or key != block or (begins and owner not in (None, use.owner_name)):
            layers.append([])
            block, owner = key, None
        layers[-1].append(named)
        if begins:
            owner = use.owner_name
    return _with_followers(layers)


def _with_followers(layers: list[list[Named]]) -> list[list[Named]]:
    """A layer of vectors alone, as a last norm, belongs to the layer before it."""
    whole: list[list[Named]] = []
    for layer in layers:
        if whole and not any(is_plain_weight(named) or is_embedding(named) for named in layer):
            whole[-1] += layer
        else:
            whole.append(layer)
    return whole


def is_in_block(use: Use) -> bool:
    """Whether it is deep inside of a block, and not a layer of a plain sequence."""
    key = block_of(use, None)
    return key is not None and key not in (id(use.owner), use.owner_name)


def block_of(use: Use, blocks: Blocks) -> Hashable:
    """What all parameters of its block have in common; None outside of blocks."""
    if blocks is None and use.modules:
        return next(
            (id(child) for parent, child in pairwise(use.modules) if _is_stack(parent)), None
        )
    found = (blocks or NUMBERED).search(use.name)
    return found.group() if found else None


def _is_stack(module: nn.Module) -> bool:
    """Whether its children are layers, one after the other."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    children = [unwrapped(child) for child in module if next(child.parameters(), None) is not None]
    if len({type(child) for child in children}) == 1:
        return len(children) > 1 or isinstance(module, nn.ModuleList)
    # blocks of two kinds alternate in some models; a Sequential may hold just anything
    composite = all(next(child.children(), None) is not None for child in children)
    return isinstance(module, nn.ModuleList) and composite
