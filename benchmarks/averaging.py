"""Averages of weights in the step, beside torch's fused step and its average of the model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import stepwell

__all__ = ["AVERAGES", "Averaging", "Timed", "averages_table", "saved"]

DECAY = 0.999
WARM = 3
ROUNDS = 7


def _transformer(width: int, layers: int, words: int) -> tuple[int, ...]:
    """The sizes of the tensors of a language model."""
    square = width * width
    attention = (3 * square, 3 * width, square, width)
    perceptron = (4 * square, 4 * width, 4 * square, width)
    layer = (*attention, *perceptron, *(width,) * 4)
    return (words * width, 256 * width, *layer * layers, width, width)


@dataclass(frozen=True)
class Averaging:
    """A model with tensors of these sizes, and how many times faster than torch it must be."""

    work: str
    sizes: tuple[int, ...] = field(repr=False)
    bar: float | None = None

    def __str__(self) -> str:
        return f"AdamW averaged {self.work}"

    def _model(self) -> torch.nn.ParameterList:
        draw = torch.Generator().manual_seed(0)
        model = torch.nn.ParameterList(torch.randn(size, generator=draw) for size in self.sizes)
        for param in model:
            param.grad = torch.randn(param.shape, generator=draw)
        return model

    def _ours(self) -> tuple[list[Tensor], Callable[[], object]]:
        rule = stepwell.averaged(stepwell.AdamW)
        optimizer = rule(self._model(), average_decay=DECAY)
        optimizer.init_state()
        averages = [state["average"] for state in optimizer.state.values()]
        return averages, optimizer.step

    def _theirs(self) -> tuple[list[Tensor], Callable[[], object]]:
        model = self._model()
        optimizer = torch.optim.AdamW(model, fused=True)
        beside = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

        def step() -> None:
            optimizer.step()
            beside.update_parameters(model)

        return [param.detach() for param in beside.parameters()], step

    def measure(self, seconds: float) -> Timed:
        """Race both for about this long, taking turns, after comparing their averages."""
        (ours, step), (theirs, other) = self._ours(), self._theirs()
        for _ in range(WARM):
            step()
            other()
        pairs = zip(ours, theirs, strict=True)
        apart = max(float((one - two).abs().max()) for one, two in pairs)
        times: tuple[list[float], list[float]] = ([], [])
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[0]) < ROUNDS:
            times[0].append(_time(step))
            times[1].append(_time(other))
        return Timed(self, *map(statistics.median, times), apart)


def _time(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e6


class Timed(NamedTuple):
    """Microseconds per step with an average, and how far the two averages are apart."""

    averaging: Averaging
    stepwell: float
    torch: float
    apart: float

    @property
    def ratio(self) -> float:
        """How many of our steps fit into one of torch's."""
        return self.torch / self.stepwell

    def misses(self) -> list[str]:
        """What was to be reached and was not."""
        # a few ULP of numbers around 5; written so that NaN fails
        missed = [] if self.apart <= 1e-5 else [f"{self.apart:.1e} away from torch"]
        bar = self.averaging.bar
        if bar is not None and self.ratio < bar:
            missed.append(f"{self.ratio:.2f}x torch, not {bar:g}x")
        return missed


AVERAGES = [
    Averaging("6 tensors, 5,000 elements", (1600, 40, 1600, 40, 1600, 120)),
    Averaging("a language model, 148 tensors, 51 M", _transformer(512, 12, 25_000), 1.25),
    Averaging("100 x 0.5 M", (500_000,) * 100, 1.25),
    # both move as many bytes as there are: 9 words per element here, 10 there
    Averaging("1 x 50 M", (50_000_000,)),
]


def averages_table(timed: Sequence[Timed]) -> Table:
    """A line per model."""
    table = Table(title="AdamW with an average of the weights: microseconds per step, medians")
    for name in ("work", "stepwell", "torch fused + average", "ratio", "must reach"):
        table.add_column(name, justify="left" if name == "work" else "right")
    for one in timed:
        times = f"{one.stepwell:,.1f}", f"{one.torch:,.1f}", f"{one.ratio:.2f}x"
        missed, bar = one.misses(), one.averaging.bar
        said = "" if bar is None else f"[green]{bar:g}x[/green]"
        said = f"[red]{'; '.join(missed)}[/red]" if missed else said
        table.add_row(one.averaging.work, *times, said)
    return table


def saved(one: Timed) -> dict[str, Any]:
    """The line, for JSON."""
    times = {"stepwell": round(one.stepwell, 2), "torch fused + average": round(one.torch, 2)}
    return {"work": str(one.averaging), "microseconds": times, "missed": one.misses()}
