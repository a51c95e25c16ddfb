"""What a parameter is: a vector, a norm's or an embedding's, or a matrix of weights."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from .naming import Named, Use

__all__ = ["is_convolution", "is_embedding", "is_expert", "is_plain_weight", "words"]

EMBEDDING = {"embedding", "embeddings", "embed"}
# learnt inputs that a module holds itself: pos_embed, cls_token
INPUT = {*EMBEDDING, "token", "tokens"}
# of modules, where only their names are known
TABLE = {*EMBEDDING, "wte", "wpe"}
EXPERT = re.compile("expert|moe", re.IGNORECASE)
# of torch.nn.utils.parametrizations.weight_norm, and of the older torch.nn.utils.weight_norm
GAIN = re.compile(r"(^|\.)(parametrizations\.\w+\.original0|weight\w*_g)$")
# how the first FSDP marks what it has flattened
FLATTENED = "_fsdp_flattened"


def words(text: str) -> list[str]:
    """The words of a name, in lower case: LlamaRMSNorm -> llama, rms, norm."""
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]{2,}", text)
    return [word.lower() for word in found]


def is_plain_weight(named: Named) -> bool:
    """Whether it is a matrix (or several), and no bias, norm, gain or embedding.

    Raises:
        ValueError: its shape is not known
    """
    if hasattr(named.param, FLATTENED):
        raise ValueError(
            f"{named.name} was flattened by FullyShardedDataParallel, so its shape is unknown: "
            "shard with torch.distributed.fsdp.fully_shard, which keeps shapes, or group by names"
        )
    return named.param.ndim >= 2 and not (
        is_embedding(named)
        or _is_gain(named)
        or any(_is_norm(use) or _is_bias(use) for use in named.uses)
    )


def is_embedding(named: Named) -> bool:
    """Whether one of its uses is to be looked up: tokens, positions."""
    return any(is_looked_up(use) for use in named.uses)


def is_looked_up(use: Use) -> bool:
    """Whether this use is one of an embedding."""
    if INPUT.intersection(words(use.attribute)):
        return True
    if use.owner is None:
        return bool(TABLE.intersection(words(_place(use))))
    classes = _classes(use.owner)
    return isinstance(use.owner, nn.EmbeddingBag) or _ends_in(EMBEDDING, classes)


def is_convolution(named: Named) -> bool:
    """Whether a convolution uses it; where only names are known, whether they say so."""
    use = named.uses[0]
    places = [_place(use)] if use.owner is None else _classes(use.owner)
    return any(word.startswith("conv") for place in places for word in words(place))


def is_expert(named: Named) -> bool:
    """Whether names or classes on the way to it speak of experts."""
    use = named.uses[0]
    spoken = [use.name, *(type(module).__name__ for module in use.modules[-2:])]
    return any(EXPERT.search(text) for text in spoken)


def _is_bias(use: Use) -> bool:
    return "bias" in words(use.attribute)


def _is_gain(named: Named) -> bool:
    """Whether it is what weight_norm takes out of a matrix: a vector with dimensions of size 1."""
    is_vector = named.param.numel() == max(named.param.shape)
    return is_vector and any(GAIN.search(use.name) for use in named.uses)


def _is_norm(use: Use) -> bool:
    places = [_place(use)] if use.owner is None else _classes(use.owner)
    return _ends_in({"norm"}, places)


def _place(use: Use) -> str:
    return use.owner_name.rpartition(".")[2]


def _classes(module: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(module).__mro__]


def _ends_in(endings: set[str], names: Iterable[str]) -> bool:
    # the last word says what it is: a LayerNormLinear is a Linear
    return any(words(name)[-1:] and words(name)[-1] in endings for name in names)
