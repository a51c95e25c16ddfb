"""Functions of two variables with a known minimum, on which optimizers are watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..optimizers import SGD, Adam, RMSprop

__all__ = ["RAVINE", "ROSENBROCK", "Contenders", "Surface"]

Contenders = Mapping[str, Callable[[list[Parameter]], Optimizer]]
"""Optimizers by their label; each is made for a list of one parameter, the point (x, y)."""


@dataclass(frozen=True)
class Surface:
    """A function to descend on.

    Attributes:
        name: what the picture calls it
        height: (x, y) -> the value, for Tensors of any shape
        start: where optimizers begin
        minimum: where the value is 0
        xlim, ylim: what the picture shows
        contenders: optimizers whose ways over it differ
    """

    name: str
    height: Callable[[Tensor, Tensor], Tensor]
    start: tuple[float, float]
    minimum: tuple[float, float]
    xlim: tuple[float, float]
    ylim: tuple[float, float]
    contenders: Contenders = field(default_factory=dict)


def _rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    """A curved valley. Rosenbrock, An Automatic Method for Finding the Greatest or Least Value of
    a Function, The Computer Journal, 1960."""
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def _ravine(x: Tensor, y: Tensor) -> Tensor:
    """Fifty times as steep across as along."""
    return 0.5 * x**2 + 25 * y**2


ROSENBROCK = Surface(
    "Rosenbrock's function",
    _rosenbrock,
    start=(-0.5, 2.5),
    minimum=(1.0, 1.0),
    xlim=(-2.0, 1.5),
    ylim=(-0.5, 3.0),
    contenders={
        "SGD, lr 0.0005": partial(SGD, lr=5e-4),
        "SGD, lr 0.0002, momentum 0.9": partial(SGD, lr=2e-4, momentum=0.9),
        "RMSprop, lr 0.05": partial(RMSprop, lr=0.05),
        "Adam, lr 0.3": partial(Adam, lr=0.3),
    },
)
RAVINE = Surface(
    "A ravine",
    _ravine,
    start=(-9.0, 1.2),
    minimum=(0.0, 0.0),
    xlim=(-10.0, 3.0),
    ylim=(-1.75, 1.75),
    contenders={
        "SGD, lr 0.037": partial(SGD, lr=0.037),
        "SGD, lr 0.01, momentum 0.8": partial(SGD, lr=0.01, momentum=0.8),
        "RMSprop, lr 0.1": partial(RMSprop, lr=0.1),
        "Adam, lr 0.3": partial(Adam, lr=0.3),
    },
)
