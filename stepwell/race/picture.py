"""A race as one picture: the loss of every epoch, and the time of a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..extra import needs_extra
from ..plot.figure import FAINT, INK, new_figure, plain, title
from .contenders import OURS
from .runner import Duel

with needs_extra("race"):
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator

# dark and pale of one hue per rule: the hue tells the rule, the shade the library
HUES = (("#1f5fa8", "#a9c8ec"), ("#c2571a", "#f3c6a5"), ("#2e7d4f", "#b1dcc1"))


@dataclass(frozen=True)
class Series:
    """What the picture shows of one contender.

    Attributes:
        rule: title of the rule
        library: who implements it
        epochs: 1, 2, 3 ...
        losses: the mean training loss of each epoch
        microseconds: the median time of a step
        color: as hex digits
    """

    rule: str
    library: str
    epochs: Sequence[int]
    losses: Sequence[float]
    microseconds: float
    color: str

    @property
    def ours(self) -> bool:
        """Whether it is stepwell's."""
        return self.library == OURS


def series(duels: Iterable[Duel]) -> list[Series]:
    """The data of the picture, rival and ours by turns."""
    return [
        Series(
            rule=duel.rule.title,
            library=result.contender.library,
            epochs=range(1, len(result.losses) + 1),
            losses=result.losses,
            microseconds=result.step_seconds * 1e6,
            color=color,
        )
        for index, duel in enumerate(duels)
        for result, color in zip(duel.results, reversed(HUES[index % len(HUES)]), strict=True)
    ]


def draw(task: str, duels: Iterable[Duel], machine: str, path: Path) -> None:
    """Write the picture of a race as a PNG file."""
    shown = series(duels)
    figure = new_figure(11, 4.8)
    what = f"{task}: the same training with torch.optim and with stepwell"
    figure.suptitle(what, color=INK, fontsize=13)
    figure.supxlabel(machine, color=FAINT, fontsize=7)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_losses(left, shown)
    _draw_times(right, shown)
    figure.savefig(path, dpi=150)


def _draw_losses(axes: Axes, shown: list[Series]) -> None:
    for one in shown:
        # ours runs thin inside the rival's broad line, so that both are seen where they agree
        width = 1.6 if one.ours else 6.0
        label = f"{one.rule}, {one.library}"
        axes.plot(one.epochs, one.losses, color=one.color, linewidth=width, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean training loss")
    title(axes, "Loss of every epoch")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    plain(axes)


def _draw_times(axes: Axes, shown: list[Series]) -> None:
    places = [index + index // 2 * 0.6 for index in range(len(shown))]
    times = [one.microseconds for one in shown]
    bars = axes.barh(places, times, color=[one.color for one in shown], height=0.85)
    axes.bar_label(bars, [_time_label(shown, i) for i in range(len(shown))], padding=4, color=INK)
    axes.set_yticks(places, [f"{one.rule}\n{one.library}" for one in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, max(times) * 1.4)
    axes.set_xlabel("median time of optimizer.step(), µs")
    title(axes, "Time of one step")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    plain(axes)


def _time_label(shown: list[Series], index: int) -> str:
    one = shown[index]
    time = f"{one.microseconds:,.1f} µs"
    if not one.ours:
        return time
    return f"{time}, {shown[index - 1].microseconds / one.microseconds:.1f}× as fast"
