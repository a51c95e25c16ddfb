"""trajectories: the ways of several optimizers over one surface."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch.optim import Optimizer

from ..language.fields import Field, Range
from .figure import FAINT, INK, figure_of, new_axes, styles, title
from .surfaces import ROSENBROCK, Contenders, Surface

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["trajectories"]

STEPS = Field("steps", None, "integer", Range(1))
GRID = 240
LEVELS = 16


def trajectories(
    surface: Surface = ROSENBROCK,
    contenders: Contenders | None = None,
    steps: int = 250,
    *,
    ax: Axes | None = None,
) -> Figure:
    """The ways of several optimizers from one point towards the minimum, over lines of height.

        trajectories(RAVINE, {"SGD": lambda params: SGD(params, lr=0.03)}, steps=50)

    A way ends where a number is no longer finite.

    Args:
        surface: what is descended on
        contenders: what makes the optimizers, by label; None: some that show a contrast
        steps: how many steps each takes
        ax: axes of a figure of your own to draw on

    Raises:
        ValueError: `steps` is below 1, or a rate is out of range
        ExtraMissingError: Matplotlib is not installed
    """
    STEPS.check(steps, "trajectories")
    if not isinstance(surface, Surface):
        raise TypeError(
            "trajectories: surface must be a stepwell.plot.Surface, such as stepwell.plot.RAVINE, "
            f"got {surface!r}"
        )
    if not isinstance(contenders, (Mapping, type(None))):
        raise TypeError(
            "trajectories: contenders must be a dict from labels to functions that make an "
            f"optimizer, {{'SGD': lambda params: SGD(params, lr=0.03)}}, got {contenders!r}"
        )
    contenders = surface.contenders if contenders is None else contenders
    if not contenders:
        raise ValueError("trajectories: contenders must be given, since the surface names none")
    axes = new_axes("x", "y", ax, height=4.8)
    axes.grid(visible=False)
    _draw_heights(axes, surface)
    for (label, make), style in zip(contenders.items(), styles(narrowing=True), strict=False):
        x, y = way_of(surface, make, steps).T
        axes.plot(x, y, label=label, **style)
        axes.plot(x[-1], y[-1], "o", color=style["color"], markersize=6)
    axes.plot(*surface.start, "s", color=INK, markersize=6)
    axes.plot(*surface.minimum, "*", color=INK, markersize=13)
    axes.set_xlim(*surface.xlim)
    axes.set_ylim(*surface.ylim)
    figure_of(axes).legend(loc="outside lower center", ncols=2, frameon=False)
    title(axes, f"{surface.name}: {steps} steps from the square to the star")
    return figure_of(axes)


def way_of(
    surface: Surface, make: Callable[[list[torch.nn.Parameter]], Optimizer], steps: int
) -> npt.NDArray[np.float64]:
    """The points (x, y), rows, from the start on, as long as they are finite."""
    point = torch.nn.Parameter(torch.tensor(surface.start, dtype=torch.float64))
    optimizer = make([point])
    points = [surface.start]
    for _ in range(steps):
        optimizer.zero_grad()
        surface.height(*point).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        x, y = point.tolist()
        if not (math.isfinite(x) and math.isfinite(y)):
            break
        points.append((x, y))
    return np.array(points)


def _draw_heights(axes: Axes, surface: Surface) -> None:
    """Lines of equal height, evenly apart in the logarithm of it."""
    x, y = (torch.linspace(*limits, GRID) for limits in (surface.xlim, surface.ylim))
    heights = surface.height(x[None, :], y[:, None]).clamp(min=1e-3)
    levels = np.geomspace(heights.quantile(0.005).item(), heights.max().item(), LEVELS)
    axes.contour(x, y, heights, levels, colors=FAINT, linewidths=0.6, alpha=0.7)
