"""The look of all pictures, and the only place that imports Matplotlib, when a picture is drawn."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sized
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from ..extra import needs_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "FAINT",
    "INK",
    "figure_of",
    "new_axes",
    "new_figure",
    "plain",
    "require_lines",
    "styles",
    "title",
    "to_small_png",
]

INK = "#333333"
FAINT = "#8a8a8a"
# Okabe and Ito, Color Universal Design, 2008: apart for every kind of colour vision
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


def new_figure(width: float = 7.0, height: float = 4.2) -> Figure:
    """A figure that needs no display and no global state; sizes are in inches."""
    with needs_extra("plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = Figure(figsize=(width, height), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def new_axes(xlabel: str, ylabel: str, ax: Axes | None = None, **size: float) -> Axes:
    """Axes with names and a light grid: those that were given, or those of a new figure."""
    axes: Axes = new_figure(**size).subplots() if ax is None else ax
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    plain(axes)
    return axes


def require_lines(lines: Sized, owner: str, what: str) -> None:
    """Check that there is something to draw.

    Raises:
        ValueError: there is nothing
        TypeError: it is no list, though one is drawn too
    """
    if not isinstance(lines, Sized):
        raise TypeError(f"{owner}: the first argument is a list, of one {what} too: [{lines}]")
    if len(lines) == 0:
        raise ValueError(f"{owner}: there is no {what} to draw")


def plain(axes: Axes) -> None:
    """No frame, and ink for what is to be read."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK)


def title(axes: Axes, text: str) -> None:
    """What the picture shows, above its left end."""
    axes.set_title(text, loc="left", color=INK, fontsize=11)


def styles(*, narrowing: bool = False) -> Iterator[dict[str, Any]]:
    """Looks of lines: a colour each, and, for eyes and printers that see none, a dash each.

    Args:
        narrowing: give each a width instead, so that one is seen through the next where they meet
    """
    for i, (color, dash) in enumerate(zip(cycle(COLORS), cycle(DASHES), strict=False)):
        if narrowing:
            yield {
                "color": color,
                "linewidth": max(1.6, 3.6 - 0.65 * i),
                "solid_joinstyle": "round",
            }
        else:
            yield {"color": color, "linestyle": dash, "linewidth": 1.8}


def figure_of(axes: Axes) -> Figure:
    """The whole picture."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def to_small_png(figure: Figure) -> bytes:
    """The picture in 256 colours: enough for lines and letters, in half of the bytes."""
    from PIL import Image

    figure.canvas.draw()
    pixels = figure.canvas.buffer_rgba()  # type: ignore[attr-defined]
    image = Image.fromarray(np.asarray(pixels)).convert("RGB").quantize(256)
    file = io.BytesIO()
    image.save(file, format="png", optimize=True)
    return file.getvalue()
