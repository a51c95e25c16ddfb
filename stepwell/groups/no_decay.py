"""no_decay: biases, norms and embeddings apart from what weight decay is for."""

from __future__ import annotations

from typing import Any

from .kinds import is_plain_weight
from .naming import Group, collect
from .patterns import Patterns, as_patterns, select
from .splitting import Part, split

__all__ = ["no_decay"]


def no_decay(params: Any, *, also: Patterns = (), decay: Patterns = ()) -> list[Group]:
    """Groups in which only matrices of weights decay.

    Not decayed are vectors and scalars (biases, gains, the weights of norms; what `weight_norm`
    takes out of a matrix too, which has dimensions of size 1), whatever belongs to a norm or is
    called a bias, and embeddings, which are known by their module (`nn.Embedding`, a class whose
    name ends in Embedding) or by their own name (`pos_embed`, `cls_token`). They get
    `weight_decay=0`; all others that of the optimizer, or of the group they come from.

    Every trainable parameter is in one group, under its name; frozen ones are left out.

    Args:
        params: a model, `model.named_parameters()`, or groups, which are split further
        also: names or patterns of others that shall not decay, such as
            `model.no_weight_decay()` of timm's models
        decay: of those that shall, such as "embed.*"

    Raises:
        TypeError, ValueError: a pattern matches nothing, or the same parameter as one of the other
            argument; see `by_pattern` for more

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    >>> for group in no_decay(model):
    ...     print(group["name"], [name for name, _ in group["params"]], group.get("weight_decay"))
    decay ['0.weight'] None
    no decay ['0.bias', '1.weight', '1.bias'] 0.0
    """
    owner = "no_decay"
    collected = collect(params, owner)
    without = {
        id(named.param)
        for some in select(as_patterns(also, owner), collected, owner)
        for named in some
    }
    kept = [named for some in select(as_patterns(decay, owner), collected, owner) for named in some]
    both = [named.spoken for named in kept if id(named.param) in without]
    if both:
        raise ValueError(f"{owner}: also and decay both match {both[0]}: make one of them narrower")
    decayed, exempt = Part("decay"), Part("no decay", {"weight_decay": 0.0})
    chosen = {id(named.param): decayed for named in kept} | dict.fromkeys(without, exempt)
    return split(
        collected,
        (decayed, exempt),
        lambda named: chosen.get(id(named.param), decayed if is_plain_weight(named) else exempt),
    )
