"""The statistics of BatchNorm layers, taken anew for weights that were not trained with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from .exact import needs_copy

__all__ = ["update_bn"]


@torch.no_grad()
def update_bn(
    loader: Iterable[Any], model: Module, device: int | torch.device | None = None
) -> None:
    """Set the running statistics of all BatchNorm layers to those of one pass over the data.

    Those in half precision are averaged in float32 and rounded at the end: on their own they would
    stop moving after some hundred batches.

    Momentum, and the mode (train or eval) of each module, are put back, also if this fails; the
    statistics too, if it fails.

    Args:
        loader: batches; of a list or tuple the first item is the model's input
        model: what has such layers; without any, nothing is done
        device: where inputs are to be moved

    Raises:
        ValueError: the loader is empty
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return
    with _collecting(model, layers):
        is_empty = True
        rounded = [_Statistics(layer) for layer in layers if _is_rounded(layer)]
        for batch in loader:
            is_empty = False
            inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
            model(inputs if device is None else inputs.to(device))
            for statistics in rounded:
                statistics.take_in()
        for statistics in rounded:
            statistics.finish()
        if is_empty:
            raise ValueError(
                "update_bn: the loader gave no batch to take statistics from (a generator that "
                "has been used up?); the statistics stay as they were"
            )


def _is_rounded(layer: _BatchNorm) -> bool:
    mean = layer.running_mean
    return mean is not None and layer.num_batches_tracked is not None and needs_copy(mean)


class _Statistics:
    """The statistics of a layer in float32; the layer itself has those of one batch at a time."""

    def __init__(self, layer: _BatchNorm) -> None:
        self._layer = layer
        self._averages = [stored.float() for stored in self._stored()]
        self._calls = self._counted().clone()

    def _stored(self) -> list[Tensor]:
        return [t for t in (self._layer.running_mean, self._layer.running_var) if t is not None]

    def _counted(self) -> Tensor:
        counted = self._layer.num_batches_tracked
        assert counted is not None
        return counted

    def take_in(self) -> None:
        """Average the statistics of a batch, in which the layer may be called several times."""
        calls = self._counted()
        self._calls += calls
        # a layer that was not called has none; the device is not asked
        weight = calls / self._calls.clamp(min=1)
        for average, stored in zip(self._averages, self._stored(), strict=True):
            average += weight * (stored - average)
        self._layer.reset_running_stats()

    def finish(self) -> None:
        """Write the averages into the layer."""
        for average, stored in zip(self._averages, self._stored(), strict=True):
            stored.copy_(average)
        self._counted().copy_(self._calls)


@contextmanager
def _collecting(model: Module, layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Train mode, and statistics that start anew and count all batches the same."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    own = chain.from_iterable(layer.buffers(recurse=False) for layer in layers)
    before = [(buffer, buffer.clone()) for buffer in own]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        model.train()
        yield
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode
