"""freeze and unfreeze: parameters that rest while an optimizer holds them."""

from __future__ import annotations

from typing import Any

from .naming import Collected, Named, collect
from .patterns import Patterns, as_patterns, select

__all__ = ["freeze", "unfreeze"]


def freeze(params: Any, patterns: Patterns | None = None) -> list[str]:
    """Let parameters rest: they get no gradients, and no optimizer moves them.

    An optimizer that has them keeps their state as it is: without a gradient there is no step, no
    weight decay, no momentum, and no count of steps. A gradient that is there is dropped. Build the
    groups and the optimizer first, since builders leave out what is frozen already. `LBFGS`, whose
    history is of all parameters together, begins it anew.

        frozen = freeze(model, "backbone.*")
        ...
        unfreeze(model, frozen)

    With DistributedDataParallel, wrap the model anew or pass `find_unused_parameters=True`: it
    waits for the gradients that it expects.

    Args:
        params: a model, parameters, groups of them, or an optimizer
        patterns: names, globs or compiled regular expressions, as in `by_pattern`; None means all

    Returns:
        the names of those that were not frozen before

    Raises:
        ValueError, TypeError: a pattern matches nothing, or patterns are given for parameters
            without names; nothing is changed

    >>> model = torch.nn.Linear(2, 1)
    >>> freeze(model, "weight")
    ['weight']
    >>> model.weight.requires_grad, model.bias.requires_grad
    (False, True)
    """
    changed = [named for named in _chosen(params, patterns, "freeze") if named.param.requires_grad]
    for named in changed:
        named.param.requires_grad_(False)
        named.param.grad = None
    return [named.name for named in changed]


def unfreeze(params: Any, patterns: Patterns | None = None) -> list[str]:
    """Let parameters learn again; an optimizer that has them goes on from the state they had.

    One that was made while they were frozen may not have them: pass the optimizer, which then says
    so, and give it the rest with `add_param_group`.

    Args:
        params: a model, parameters, groups of them, or an optimizer
        patterns: as in `freeze`, which returns what to pass here; None means all that can learn:
            integers cannot

    Returns:
        the names of those that were frozen before

    Raises:
        ValueError, TypeError: a pattern matches nothing, or patterns are given for parameters
            without names; nothing is changed
    """
    changed = [
        named for named in _chosen(params, patterns, "unfreeze") if not named.param.requires_grad
    ]
    for named in changed:
        named.param.requires_grad_(True)
    return [named.name for named in changed]


def _chosen(params: Any, patterns: Patterns | None, owner: str) -> list[Named]:
    collected = collect(params, owner, frozen_too=True, unnamed_too=patterns is None)
    members = [named for named in collected.members if _can_learn(named)]
    if patterns is None:
        return members
    known = Collected([{"params": members}], [])
    found = select(as_patterns(patterns, owner), known, owner)
    return list({id(named.param): named for some in found for named in some}.values())


def _can_learn(named: Named) -> bool:
    return named.param.is_floating_point() or named.param.is_complex()
