"""Averages of weights that an optimizer keeps in its step: how to ask for them, and to use them.

    optimizer = stepwell.averaged(stepwell.AdamW)(model.parameters(), lr=1e-3, average_decay=0.999)
    ...
    with stepwell.averaged_weights(optimizer):
        evaluate(model)

What is averaged, and when, is `stepwell.language.Average`'s to say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import starmap
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from .cohort import PLAIN_TYPES, has_gaps_or_overlaps
from .composing import check_class, compose
from .language import Average
from .optimizer import Optimizer
from .wrapped import inner_optimizer

__all__ = ["averaged", "averaged_weights"]

CHUNK = 1 << 20
"""How many elements change places at a time."""

_inside: WeakSet[Any] = WeakSet()


def averaged(rule: type[Optimizer]) -> type[Optimizer]:
    """The rule with an average of the parameters in its state, updated in the same pass.

    `averaged(AdamW)` takes AdamW's arguments and, as keywords, `average_decay`, `average_warmup`,
    `average_start` and `average_every`; it is `compose(AdamW, Average)`, see
    `stepwell.language.Average`.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = averaged(SGD)([weight], lr=0.5, average_decay=0.75)
    >>> for _ in range(2):
    ...     weight.grad = torch.tensor([1.0])
    ...     optimizer.step()
    >>> with averaged_weights(optimizer):  # 0.75 * 0.5 + 0.25 * 0
    ...     weight.item()
    0.375
    >>> weight.item()
    0.0

    Raises:
        TypeError: not the class of a rule that is a formula, as `Muon` and `LBFGS` are not, or one
            that has an average already
    """
    check_class(rule, "averaged", "averaged({})")
    if Average in getattr(rule, "transforms", ()):
        raise TypeError(
            f"averaged: {rule.__name__} keeps an average already, and there is only one"
        )
    if getattr(rule, "formula", rule) is None:
        raise TypeError(
            f"averaged: {rule.__name__} is not a per-element formula, so the average cannot be "
            "computed in its step; use stepwell.swa_utils.AveragedModel"
        )
    return compose(rule, Average)


@contextmanager
def averaged_weights(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module | None = None
) -> Iterator[None]:
    """Inside, the parameters are their averages; afterwards what they were, whatever happened.

    Parameters and averages change places where they lie, so that pointers, views, tied weights
    and captured graphs go on holding. That takes no memory but a buffer of a million elements; for
    parameters in half precision, whose averages are float32, a copy of the parameters. A parameter
    that has no average yet is left as it is. Inside of itself it does nothing.

    Args:
        optimizer: made with `averaged(rule)`, or composed with `Average`
        model: its buffers are put back too, so that `swa_utils.update_bn(loader, model)`, which
            BatchNorm needs for other weights than it was trained with, can be called inside

    Raises:
        TypeError: the optimizer keeps no averages
        RuntimeError: inside, for what would work with the wrong weights: steps, and state dicts
            of the optimizer; at the end, if parameters were changed inside
    """
    optimizer = inner_optimizer(optimizer, "averaged_weights")
    parts = _parts(optimizer)
    with ExitStack() as stack:
        if model is not None:
            stack.callback(_copy, [(buffer, buffer.clone()) for buffer in model.buffers()])
        # of several that are combined each refuses, and changes places once
        for each in dict.fromkeys([optimizer, *parts]):
            if each not in _inside:
                stack.enter_context(_refusing(each))
                if each in parts:
                    stack.enter_context(_exchanged(each))
        yield


def _parts(optimizer: Any) -> list[Any]:
    """The optimizer itself, or those that it combines."""
    combined = getattr(optimizer, "optimizers", {})
    for name, part in combined.items():
        if not _keeps_averages(part):
            raise TypeError(
                f"averaged_weights: {name!r} in {type(optimizer).__name__} keeps no averages; "
                "average the whole model with stepwell.swa_utils.AveragedModel"
            )
    if not (combined or _keeps_averages(optimizer)):
        raise TypeError(
            f"averaged_weights: {type(optimizer).__name__} keeps no averages; make it with "
            "stepwell.averaged(stepwell.AdamW)(params, ...), or another rule, or average the "
            "model with stepwell.swa_utils.AveragedModel"
        )
    return list(combined.values()) or [optimizer]


def _keeps_averages(optimizer: Any) -> bool:
    formula = getattr(optimizer, "formula", None)
    return formula is not None and "average" in formula.slots


@contextmanager
def _refusing(optimizer: Any) -> Iterator[None]:
    """Inside, the optimizer refuses what would work with the wrong weights."""
    with ExitStack() as stack:
        for register, what in (
            (optimizer.register_step_pre_hook, "take a step"),
            (optimizer.register_state_dict_pre_hook, "make a state dict"),
            (optimizer.register_load_state_dict_pre_hook, "load a state dict"),
        ):
            stack.callback(register(_refusal(what)).remove)
        optimizer._refuse_copies = _refusal("be copied or pickled")
        stack.callback(vars(optimizer).pop, "_refuse_copies")
        stack.callback(_inside.discard, optimizer)
        _inside.add(optimizer)
        yield


@contextmanager
def _exchanged(optimizer: Any) -> Iterator[None]:
    swap = _Swap(_pairs(optimizer))
    swap.enter()
    try:
        yield
    finally:
        changed = swap.leave()
    if changed:
        raise RuntimeError(
            f"averaged_weights: {changed} parameters were changed inside; they are what they were "
            "before, but what was written into them is now their average"
        )


def _refusal(what: str) -> Any:
    def refuse(*_: Any) -> None:
        raise RuntimeError(
            f"cannot {what} inside averaged_weights: the parameters are their averages, and the "
            "averages the parameters; leave the block first"
        )

    return refuse


def _pairs(optimizer: Any) -> list[_Pair]:
    """The parameters that have an average, and this, as they lie in memory."""
    pairs = []
    for index, group in enumerate(optimizer.param_groups):
        for number, param in enumerate(group["params"]):
            average = optimizer.state.get(param, {}).get("average")
            if average is None:
                continue
            if average.shape != param.shape:
                raise ValueError(
                    f"averaged_weights: the average of group {index}, parameter {number} has shape "
                    f"{tuple(average.shape)}, its parameter {tuple(param.shape)}"
                )
            pairs.append(_Pair(param, _memory(param), _memory(average)))
    return pairs


class _Pair(NamedTuple):
    param: Tensor
    weights: Tensor
    average: Tensor


class _Swap:
    """Weights and averages that change places, and change back in the opposite order."""

    def __init__(self, pairs: Sequence[_Pair]) -> None:
        self._pairs = pairs
        self._alike = [(p.weights, p.average) for p in pairs if _are_alike(p.weights, p.average)]
        others = [p for p in pairs if not _are_alike(p.weights, p.average)]
        self._others = [(p.weights, p.average) for p in others]
        self._kept: list[Tensor] = []
        self._versions: list[int] = []

    def enter(self) -> None:
        """Put the averages into the weights."""
        copies = _exchanges(self._alike)
        self._kept = [torch.empty_like(weights) for weights, _ in self._others]
        for (weights, average), kept in zip(self._others, self._kept, strict=True):
            copies += [(kept, weights), (weights, average)]
        _copy(copies)
        self._versions = [_version(pair.weights) for pair in self._pairs]

    def leave(self) -> int:
        """Put the weights back, also into parameters that lie elsewhere now; how many changed."""
        pairs = zip(self._pairs, self._versions, strict=True)
        changed = sum(_version(pair.weights) != version for pair, version in pairs)
        trained = [(w, kept) for (w, _), kept in zip(self._others, self._kept, strict=True)]
        _copy([*trained[::-1], *_exchanges(self._alike[::-1])])
        for param, weights, _ in self._pairs:
            now = _memory(param)
            if now.data_ptr() != weights.data_ptr():
                now.copy_(weights)
        return changed


def _exchanges(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The copies (to, from) after which two tensors have changed places, chunk by chunk."""
    buffers: dict[Any, Tensor] = {}
    copies = []
    for weights, average in pairs:
        key = weights.device, weights.dtype
        if key not in buffers:
            buffers[key] = torch.empty(CHUNK, dtype=weights.dtype, device=weights.device)
        for start in range(0, weights.numel(), CHUNK):
            one, other = (_flat(tensor)[start : start + CHUNK] for tensor in (weights, average))
            kept = buffers[key][: len(one)]
            copies += [(kept, one), (one, other), (other, kept)]
    return copies


def _copy(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy all (to, from), in one call: between two of them nothing can interrupt."""
    with torch.no_grad():
        deque(starmap(Tensor.copy_, copies), maxlen=0)


def _memory(tensor: Tensor) -> Tensor:
    """The tensor without its history; of a DTensor, what this process holds of it."""
    with torch.no_grad():
        part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach()


def _flat(tensor: Tensor) -> Tensor:
    """All elements in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _are_alike(weights: Tensor, average: Tensor) -> bool:
    """Whether the two can change places element by element, as they lie in memory."""
    return (
        type(weights) in PLAIN_TYPES
        and type(average) in PLAIN_TYPES
        and weights.dtype == average.dtype
        and weights.device == average.device
        and weights.stride() == average.stride()
        and not has_gaps_or_overlaps(weights)
        and not has_gaps_or_overlaps(average)
    )


def _version(tensor: Tensor) -> int:
    """A count of the changes in place; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version
