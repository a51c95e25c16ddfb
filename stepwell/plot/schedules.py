"""schedule: curves and schedulers, step by step."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch.optim.lr_scheduler import LRScheduler

from ..language.fields import Field, Range
from ..lr_scheduler import Curve, Schedule
from .figure import INK, figure_of, new_axes, require_lines, styles, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["schedule"]

# whole numbers that a float holds
STEPS = Field("steps", None, "integer", Range(1, 1e15))
RATE = Field("lr", None, "number", Range(0))
MOST_POINTS = 4000
FEW_STEPS = 100
WIDEST_LABEL = 70
CURVE_LABEL = "factor of the learning rate"
RATE_LABEL = "learning rate"


@dataclass(frozen=True)
class Line:
    """What is drawn as one line: a value for each of some steps."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]


def schedule(
    shown: Any, steps: int | None = None, *, lr: float | None = None, ax: Axes | None = None
) -> Figure:
    """Draw a schedule, or several in one picture: a value for each step.

        schedule(warmup(500) >> cosine(9_500))
        schedule({"ours": curve, "theirs": other}, 10_000, lr=3e-4)
        schedule(scheduler, 10_000).savefig("schedule.png")

    Of a scheduler, the learning rates ahead of where it stands are drawn, one line for each that
    differs between groups, and no other hyperparameter; it is not moved. Of a very long schedule
    some 4,000 steps are shown.

    Args:
        shown: a curve, a scheduler of stepwell, or several, as a list or a dict with their labels
        steps: how many steps; None: until the longest curve ends
        lr: what curves are multiplied by; None: the factor itself is drawn
        ax: axes of a figure of your own to draw on

    Returns:
        the figure, which is not shown by itself: `savefig` writes it

    Raises:
        ValueError, TypeError: `steps` is missing where no curve has an end, or below 1; `lr` is
            negative; what is shown is neither curve nor scheduler
        ExtraMissingError: Matplotlib is not installed
    """
    sources = _labelled(shown)
    wanted = _steps(sources.values()) if steps is None else steps
    last = int(STEPS.check(wanted, "schedule"))
    factor = 1.0 if lr is None else float(RATE.check(lr, "schedule"))
    lines = [line for label, one in sources.items() for line in _lines(label, one, last, factor)]
    are_rates = lr is not None or not all(isinstance(one, Curve) for one in sources.values())
    names = [textwrap.fill(line.label, WIDEST_LABEL) for line in lines]
    ylabel = RATE_LABEL if are_rates else CURVE_LABEL
    axes = new_axes("step", ylabel, ax, height=_height(names))
    for line, style in zip(lines, styles(), strict=False):
        _draw(axes, line, style)
    axes.set_xlim(0, last)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _name(axes, names, own=ax is None)
    return figure_of(axes)


def _labelled(shown: Any) -> dict[str, Any]:
    """What is shown, by its label."""
    if isinstance(shown, Mapping):
        sources = {str(label): one for label, one in shown.items()}
    else:
        single = isinstance(shown, (Curve, LRScheduler)) or not isinstance(shown, Iterable)
        sources = {}
        for one in [shown] if single else shown:
            sources[_label(one, sources)] = one
    require_lines(sources, "schedule", "curve")
    for one in sources.values():
        if not isinstance(one, Curve) and not hasattr(one, "preview"):
            raise TypeError(f"schedule: {_refusal(one)}")
    return sources


def _label(one: Any, taken: Container[str]) -> str:
    """Its name; a second one of this name is numbered."""
    name = repr(one) if isinstance(one, Curve) else type(one).__name__
    numbered = chain([name], (f"{name} ({number})" for number in count(2)))
    return next(label for label in numbered if label not in taken)


def _refusal(one: Any) -> str:
    name = type(one).__name__
    if isinstance(one, LRScheduler):
        return (
            f"{name} of torch has no preview: stepwell.lr_scheduler.{name} takes the same arguments"
        )
    return (
        f"a curve such as stepwell.lr_scheduler.cosine(1000), or a scheduler, is drawn, got {name}"
    )


def _steps(sources: Iterable[Any]) -> int:
    ends = [end for one in sources for end in _ends(one) if end is not None]
    if not ends or max(ends) <= 0:
        raise ValueError(
            "schedule: steps must be given, since nothing of what is drawn says where it ends "
            "(a curve with a number of steps does)"
        )
    return math.ceil(max(ends))


def _ends(one: Any) -> Iterator[float | None]:
    """Yield how many steps ahead a curve ends, or each curve of the rate in a Schedule."""
    if isinstance(one, Curve):
        yield one.steps
    elif isinstance(one, Schedule):
        for curve in one.curves("lr"):
            yield None if curve.steps is None else curve.steps - one.last_epoch


def _lines(label: str, one: Any, last: int, factor: float) -> Iterator[Line]:
    if isinstance(one, Curve):
        steps = _chosen(last).tolist()
        yield Line(label, steps, [factor * one(step) for step in steps])
    else:
        yield from _rates(label, one, last)


def _rates(label: str, scheduler: Any, count: int) -> Iterator[Line]:
    """The rates of `count` steps, and no more: some schedulers refuse a step beyond their end."""
    steps = _chosen(count - 1)
    rates = np.array(scheduler.preview(count), dtype=float)[steps]
    groups = scheduler.optimizer.param_groups
    distinct: dict[bytes, list[int]] = {}
    for index in range(rates.shape[1]):
        distinct.setdefault(rates[:, index].tobytes(), []).append(index)
    for indices in distinct.values():
        which = ", ".join(str(groups[i].get("name", f"group {i}")) for i in indices)
        whole = label if len(distinct) == 1 else f"{label}, {which}"
        yield Line(whole, steps.tolist(), rates[:, indices[0]].tolist())


def _chosen(last: int) -> npt.NDArray[np.int64]:
    """All steps from 0 to `last`, or as many as a picture can show."""
    points = min(last + 1, MOST_POINTS)
    return np.unique(np.linspace(0, last, points).round().astype(np.int64))


def _draw(axes: Axes, line: Line, style: Mapping[str, Any]) -> None:
    # a rate holds for its whole step, which is seen if there are few
    shape = "steps-post" if len(line.steps) <= FEW_STEPS else "default"
    axes.plot(line.steps, line.values, label=line.label, drawstyle=shape, **style)


def _height(names: Sequence[str]) -> float:
    """Of the figure, in inches: the lines of the legend leave the axes as high as they are."""
    written = sum(name.count("\n") + 1 for name in names)
    return 4.2 + 0.21 * max(written - 3, 0)


def _name(axes: Axes, names: Sequence[str], *, own: bool) -> None:
    """One curve is the title; several are listed below the picture, where none is covered."""
    if len(names) == 1:
        title(axes, names[0])
    elif own:
        figure_of(axes).legend(
            axes.get_lines(), names, loc="outside lower left", frameon=False, labelcolor=INK
        )
    else:
        axes.legend(frameon=False)
