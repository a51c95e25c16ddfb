"""by_pattern: hyperparameters by the names of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .naming import Group, collect
from .patterns import Pattern, as_patterns, assign, spelt
from .splitting import Part, split

__all__ = ["by_pattern"]

RESERVED = ("params", "param_names")
OVERRIDING = (
    ", or, if one shall override the other, give it to a second by_pattern that takes the groups "
    "of the first"
)


def by_pattern(params: Any, patterns: Mapping[Pattern, Mapping[str, Any]]) -> list[Group]:
    """A group for each pattern of names, and one for what no pattern matches.

        by_pattern(model, {"backbone.*": dict(lr=Times(0.1)), "*.bias": dict(weight_decay=0)})

    A pattern is a name, a glob (`*` stands for dots too), or a compiled regular expression, which
    is searched for in the name. Names are those of `named_parameters()` without what torch.compile,
    DDP, FSDP and activation checkpointing put into them. A tied weight is matched by each of its
    names, and stands under the first. Parameters that no pattern matches keep the hyperparameters
    of the optimizer, or of the group they come from. `lr=Times(0.1)` is a tenth of those.

    What is refined comes later: `by_pattern(by_pattern(model, {"*": ...}), {"head.*": ...})`, and
    `no_decay(by_pattern(model, ...))`. Every trainable parameter is in one group, under its name;
    frozen ones are left out.

    Args:
        params: a model, `model.named_parameters()`, or groups, which are split further
        patterns: the hyperparameters of each pattern

    Raises:
        ValueError: a pattern matches no parameter (the nearest names are listed), two match the
            same one, two parameters have one name, one is in two groups, or has no shape yet, or
            nothing is there to be trained
        TypeError: parameters have no names; a pattern is no str or regular expression; what it
            stands for is no dict of hyperparameters

    >>> model = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 1)})
    >>> groups = by_pattern(model, {"head.*": dict(lr=0.1)})
    >>> [(group.get("name"), group.get("lr"), len(group["params"])) for group in groups]
    [('head.*', 0.1, 2), (None, None, 2)]
    """
    owner = "by_pattern"
    if not isinstance(patterns, Mapping):
        raise TypeError(
            f"{owner}: patterns must be a dict of patterns and their hyperparameters, such as "
            f"{{'backbone.*': dict(lr=1e-4)}}, got {type(patterns).__name__}"
        )
    as_patterns(list(patterns), owner)
    parts = {key: Part(spelt(key), _checked(key, patterns[key])) for key in patterns}
    collected = collect(params, owner)
    chosen = assign(parts, collected, owner, OVERRIDING)
    others = Part()
    return split(
        collected, (*parts.values(), others), lambda named: chosen.get(id(named.param), others)
    )


def _checked(key: Pattern, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise TypeError(
            f"by_pattern: {spelt(key)!r} must stand for a dict of hyperparameters, such as "
            f"dict(lr=1e-4), got {values!r}"
        )
    for name in RESERVED:
        if name in values:
            raise ValueError(f"by_pattern: {spelt(key)!r} chooses the {name}: leave out this key")
    return values
