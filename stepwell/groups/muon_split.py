"""muon_split: hidden matrices for Muon, and all others for AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..language.fields import Field, Range
from .kinds import is_convolution, is_embedding, is_expert, is_looked_up, is_plain_weight
from .layers import is_in_block
from .naming import Group, Named, collect
from .patterns import Pattern, Patterns, as_patterns, assign, select
from .splitting import Part, split

__all__ = ["MuonSplit", "muon_split"]

BATCH_DIMS = Field("batch_dims", None, "integer", Range(0))


class MuonSplit(NamedTuple):
    """Two lists of groups.

    Attributes:
        hidden: for `Muon`: the matrices of hidden layers, by their `batch_dims`
        others: for `AdamW`: vectors, embeddings, the head, and what was sent there
    """

    hidden: list[Group]
    others: list[Group]


def muon_split(
    params: Any,
    *,
    head: Patterns | None = None,
    others: Patterns = (),
    batch_dims: Mapping[Pattern, int] | None = None,
) -> MuonSplit:
    """Matrices of hidden layers, and all others: the groups of two optimizers.

        hidden, others = muon_split(model)
        adamw = AdamW(no_decay(others), lr=3e-4)
        optimizer = stepwell.Combined({"muon": Muon(hidden, lr=0.02), "adamw": adamw})

    `others` are vectors and scalars, norms, embeddings (see `no_decay`) and the head: the last
    matrix that lies in no block (see `layerwise_decay`), unless it is tied to an embedding.

    Convolutions are hidden: `Muon` flattens their weights to (out, in x height x width). A tensor
    of three dimensions or more whose module or name speaks of experts is a batch of matrices: all
    but its last two dimensions number them, and its group says so by `batch_dims`. For any other
    tensor of this kind `batch_dims` must say what it is: it is never guessed from the shape.

    Every trainable parameter is in one group, under its name; frozen ones are left out.

    Args:
        params: a model, `model.named_parameters()`, or groups, which are split further
        head: names or patterns of the head, where it is not the last matrix; `()` if there is none
        others: names or patterns of further parameters that are not for `Muon`, as of routers
        batch_dims: for patterns of names, how many dimensions come before those of a matrix; 0 for
            one matrix, which is flattened

    Raises:
        ValueError: a pattern matches nothing, two of `batch_dims` match the same parameter, or it
            is not known whether a tensor is one matrix or several; see `by_pattern` for more

    >>> model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    >>> hidden, others = muon_split(model)
    >>> [name for name, _ in hidden[0]["params"]]
    ['0.weight', '1.weight']
    """
    owner = "muon_split"
    collected = collect(params, owner)
    sent = as_patterns(others, owner) + as_patterns(() if head is None else head, owner)
    apart = {id(named.param) for some in select(sent, collected, owner) for named in some}
    if head is None:
        apart |= {id(named.param) for named in _heads(collected.members)}
    matrices = [
        named
        for named in collected.members
        if id(named.param) not in apart and is_plain_weight(named)
    ]
    dims = _batch_dims(matrices, assign(batch_dims or {}, collected, owner))
    hidden = {
        n: Part("experts", {"batch_dims": n}) if n else Part("hidden")
        for n in sorted(set(dims.values()))
    }
    rest = Part("others")

    def part_of(named: Named) -> Part:
        key = id(named.param)
        return hidden[dims[key]] if key in dims else rest

    return MuonSplit(
        split(collected, list(hidden.values()), part_of), split(collected, [rest], part_of)
    )


def _heads(members: list[Named]) -> list[Named]:
    """The last matrix outside of blocks, if the head is no embedding too."""
    tied = any(is_embedding(named) and not all(map(is_looked_up, named.uses)) for named in members)
    outside = [
        named for named in members if is_plain_weight(named) and not is_in_block(named.uses[0])
    ]
    return [] if tied else outside[-1:]


def _batch_dims(matrices: list[Named], asked: Mapping[int, int]) -> dict[int, int]:
    """How many dimensions come before those of a matrix, by the id of the parameter."""
    for count in asked.values():
        BATCH_DIMS.check(count, "muon_split")
    return {
        id(named.param): asked[id(named.param)] if id(named.param) in asked else _known_dims(named)
        for named in matrices
    }


def _known_dims(named: Named) -> int:
    ndim = named.param.ndim
    if ndim == 2 or is_convolution(named):
        return 0
    if is_expert(named):
        return ndim - 2
    raise ValueError(
        f"muon_split: {named.name} has {ndim} dimensions and belongs to no convolution: say "
        f"batch_dims={{{named.name!r}: {ndim - 2}}} if all but the last two number matrices, as "
        "those of experts do, 0 if it is one matrix to be flattened, or leave it to the other "
        f"optimizer by others=[{named.name!r}]"
    )
