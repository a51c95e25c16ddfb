"""learning_rates and momenta: the loss of gradient descent on x^2, iteration by iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..language.fields import Field, Range
from ..optimizers import SGD
from .figure import figure_of, new_axes, require_lines, styles, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["learning_rates", "momenta"]

STEPS = Field("steps", None, "integer", Range(1))
FLOOR = 1e-8
CEILING = 1e2


def learning_rates(
    rates: Sequence[float] = (0.01, 0.05, 0.2, 0.9, 1.0, 1.05),
    steps: int = 40,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Loss against iteration for several rates, on f(x) = x^2 from x = 1.

        x_k = (1 - 2 lr)^k

    so 0.5 is best, above it the sign of x changes at every step, and above 1 it grows.

    Args:
        rates: the rates of `SGD`, one line each
        steps: how many iterations
        ax: axes of a figure of your own to draw on

    Raises:
        ValueError: there is no rate, one is negative, or `steps` is below 1
        ExtraMissingError: Matplotlib is not installed
    """
    STEPS.check(steps, "learning_rates")
    require_lines(rates, "learning_rates", "rate")
    losses = {f"lr = {rate:g}": losses_of(steps, lr=rate) for rate in rates}
    return _drawn(losses, "Gradient descent on x²: the learning rate", ax)


def momenta(
    momenta: Sequence[float] = (0.0, 0.5, 0.8, 0.95),
    lr: float = 0.02,
    steps: int = 120,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Loss against iteration for several momenta, on f(x) = x^2 from x = 1.

        x_k+1 = x_k - 2 lr x_k + momentum (x_k - x_k-1)

    The best one is (1 - sqrt(2 lr))^2; above it x swings around the minimum, and the loss falls by
    the momentum itself per step.

    Args:
        momenta: the momenta of `SGD`, one line each
        lr: the rate of all of them
        steps: how many iterations
        ax: axes of a figure of your own to draw on

    Raises:
        ValueError: there is no momentum, one or the rate is out of range, or `steps` is below 1
        ExtraMissingError: Matplotlib is not installed
    """
    STEPS.check(steps, "momenta")
    require_lines(momenta, "momenta", "momentum")
    losses = {f"momentum = {m:g}": losses_of(steps, lr=lr, momentum=m) for m in momenta}
    return _drawn(losses, f"Gradient descent on x²: momentum, at lr = {lr:g}", ax)


def losses_of(steps: int, **options: Any) -> list[float]:
    """x^2 before the first step and after each of `steps` steps of `SGD`, from x = 1."""
    x = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = SGD([x], **options)
    losses = [1.0]
    for _ in range(steps):
        optimizer.zero_grad()
        x.square().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        # a product, which is infinite where a power is an error
        losses.append(x.item() * x.item())
    return losses


def _drawn(losses: Mapping[str, Sequence[float]], name: str, ax: Axes | None) -> Figure:
    axes = new_axes("iteration", "loss f(x) = x²", ax)
    # before there are lines, which may be infinite
    axes.set_yscale("log")
    highest = max(map(max, losses.values()))
    axes.set_ylim(FLOOR, min(CEILING, 3 * highest))
    for (label, values), style in zip(losses.items(), styles(), strict=False):
        axes.plot(values, label=label, **style)
    axes.set_xlim(0, len(next(iter(losses.values()))) - 1)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    title(axes, name)
    return figure_of(axes)
