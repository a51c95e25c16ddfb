"""forgetting: how long an exponential average remembers a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..language.fields import Field, Range
from ..optimizers import Adam
from .figure import figure_of, new_axes, require_lines, styles, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["forgetting"]

STEPS = Field("steps", None, "integer", Range(1))


def forgetting(
    betas: Sequence[float] = (0.8, 0.9, 0.95, 0.98), steps: int = 60, *, ax: Axes | None = None
) -> Figure:
    """How an exponential average forgets: the weight that each past gradient has in it.

        weight of the gradient of k steps ago = (1 - beta) beta ^ k

    It is measured: `Adam` gets one gradient per element and step, and its `exp_avg` is drawn. The
    weights of the last 1 / (1 - beta) steps, marked by a point, sum to some 63 %.

    Args:
        betas: how much of the average survives a step, one line each
        steps: how far back
        ax: axes of a figure of your own to draw on

    Raises:
        ValueError: there is no beta, one lies outside of [0, 1), or `steps` is below 1
        ExtraMissingError: Matplotlib is not installed
    """
    STEPS.check(steps, "forgetting")
    require_lines(betas, "forgetting", "beta")
    axes = new_axes("steps ago", "weight in the average", ax)
    for beta, style in zip(betas, styles(), strict=False):
        weights = weights_of(beta, steps)
        axes.plot(range(steps), weights, label=f"β = {beta:g}", **style)
        memory = round(1 / (1 - beta))
        if memory < steps:
            axes.plot(memory, weights[memory], "o", color=style["color"], markersize=6)
    axes.set_xlim(0, steps - 1)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, title="a point: 1 / (1 - β) steps ago")
    title(axes, "How an exponential average forgets")
    return figure_of(axes)


def weights_of(beta: float, steps: int) -> list[float]:
    """The weight in `exp_avg` of the gradient of 0, 1, 2 ... steps ago."""
    param = torch.nn.Parameter(torch.zeros(steps, dtype=torch.float64))
    optimizer = Adam([param], betas=(beta, 0.999))
    for gradient in torch.eye(steps, dtype=torch.float64):
        param.grad = gradient
        optimizer.step()
    weights: list[float] = optimizer.state[param]["exp_avg"].flip(0).tolist()
    return weights
