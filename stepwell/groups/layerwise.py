"""layerwise_decay: the lower a layer, the smaller its rate."""

from __future__ import annotations

import re
from typing import Any

from ..language.fields import Field, Range
from ..param_groups import Times
from .layers import Blocks, layers_of
from .naming import Group, collect
from .splitting import Part, split

__all__ = ["layerwise_decay"]

RATE = Field("rate", None, "number", Range(0, 1, open="("))


def layerwise_decay(params: Any, rate: float, *, blocks: Blocks | str = None) -> list[Group]:
    """One group per layer, each of which learns `rate` times as fast as the one above it.

        lr of layer k of n = lr * rate ^ (n - 1 - k)        k = 0 (the first) ... n - 1 (the last)

    where lr is the optimizer's own rate, as `Times` says; groups that have a rate keep theirs as
    what is multiplied, so that it can be combined with `by_pattern`.

    Layers follow one another as modules were made. Each block is one: a child of the outermost
    list of modules of one class (`encoder.layers.3`). Outside of blocks a layer begins with each
    module that has a matrix of weights; the embeddings before it, and the vectors around it, belong
    to it. Where only names are known, a block is a name up to its first number. `table` shows
    what came of it, and `by_pattern` with `Times` serves any other order.

    Every trainable parameter is in one group, under its name (a tied one where it is used first);
    frozen ones are left out, and not counted as layers.

    Source: Howard and Ruder, Universal Language Model Fine-tuning, arXiv:1801.06146; as powers of
    one number per block: Clark et al., ELECTRA, arXiv:2003.10555.

    Args:
        params: a model, `model.named_parameters()`, or groups, which are split further
        rate: what each layer loses to the one above it, in (0, 1]
        blocks: a regular expression for the part of a name that tells a block from others, where
            the lists of modules do not, as r"layers\\.\\d+\\.blocks\\.\\d+"

    Raises:
        ValueError, TypeError: `rate` is out of range, `blocks` matches no name; see `by_pattern`
            for more

    >>> model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    >>> for group in layerwise_decay(model, 0.5):
    ...     print(group["name"], group["lr"])
    layer 0 Times(factor=0.25)
    layer 1 Times(factor=0.5)
    layer 2 Times(factor=1.0)
    """
    owner = "layerwise_decay"
    RATE.check(rate, owner)
    collected = collect(params, owner)
    members = collected.members
    try:
        blocks = re.compile(blocks) if isinstance(blocks, str) else blocks
    except re.error as error:
        raise ValueError(f"{owner}: blocks={blocks!r} is no regular expression: {error}") from None
    if blocks is not None and not any(blocks.search(named.name) for named in members):
        raise ValueError(
            f"{owner}: blocks={blocks.pattern!r} is found in no name; they are such as "
            f"{members[len(members) // 2].name}"
        )
    layers = layers_of(members, blocks)
    last = len(layers) - 1
    parts = [Part(f"layer {i}", {"lr": Times(rate ** (last - i))}) for i in range(len(layers))]
    part_of = {
        id(named.param): part for part, layer in zip(parts, layers, strict=True) for named in layer
    }
    return split(collected, parts, lambda named: part_of[id(named.param)])
