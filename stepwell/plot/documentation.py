"""The pictures of the documentation: what each shows, and how all are made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..lr_scheduler import parse
from .averages import forgetting
from .descent import learning_rates, momenta
from .figure import to_small_png
from .schedules import schedule
from .surfaces import RAVINE
from .trajectories import trajectories

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CURVES", "PICTURES", "write"]

# by the name of what each is about: the curves in one picture, and for how many steps
CURVES: Mapping[str, tuple[tuple[str, ...], int]] = {
    "constant": (("constant(0.3, steps=300) >> constant(1)", "constant(0.7)"), 1000),
    "cosine": (("cosine(1000)", "cosine(1000, end=0.1)"), 1000),
    "cosine_restarts": (("cosine_restarts(250)", "cosine_restarts(150, growth=2, end=0.1)"), 999),
    "cosine_wave": (("cosine_wave(400)", "cosine_wave(250, end=0.2)"), 1000),
    "cyclic": (
        (
            "cyclic(125, low=0.1)",
            "cyclic(125, low=0.1, mode='triangular2')",
            "cyclic(125, low=0.1, mode='exp_range', gamma=0.998)",
        ),
        1000,
    ),
    "exponential": (("exponential(0.99)", "exponential(0.997)"), 1000),
    "inverse_sqrt": (("warmup(100) >> inverse_sqrt(100)", "inverse_sqrt(30)"), 1000),
    "linear": (("linear(1, 0, 1000)", "linear(0.3, 1, 200)"), 1000),
    "multi_step": (("multi_step([300, 600, 900], gamma=0.5)",), 1000),
    "one_cycle": (
        ("one_cycle(1000)", "one_cycle(1000, shape='linear')", "one_cycle(1000, three_phase=True)"),
        1000,
    ),
    "polynomial": (
        ("polynomial(1000)", "polynomial(1000, power=2)", "polynomial(1000, power=2, end=0.2)"),
        1000,
    ),
    "rex": (("rex(1000)", "rex(1000, end=0.1)"), 1000),
    "step": (("step(200, gamma=0.5)", "step(300)"), 999),
    "warmup": (("warmup(100) >> cosine(900)", "warmup(300) >> constant()"), 1000),
    "warmup_stable_decay": (
        ("warmup_stable_decay(100, 650, 250)", "warmup(100) >> constant(steps=650) >> rex(250)"),
        1000,
    ),
    "composition": (
        (
            "warmup(50) >> cosine(950)",
            "(warmup(50) >> cosine(950)) * 0.5",
            "cosine(1000) * cosine_restarts(250, end=0.5)",
        ),
        1000,
    ),
}


def _drawn(name: str) -> Figure:
    texts, steps = CURVES[name]
    return schedule(list(map(parse, texts)), steps)


PICTURES: Mapping[str, Callable[[], Figure]] = {
    **{name: partial(_drawn, name) for name in CURVES},
    "forgetting": forgetting,
    "learning_rates": learning_rates,
    "momenta": momenta,
    "rosenbrock": trajectories,
    "ravine": partial(trajectories, RAVINE, steps=60),
}
"""What makes each picture, by the name of its file."""


def write(folder: Path) -> Iterator[Path]:
    """Make all pictures in this folder anew; the paths, as they are written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        path = folder / f"{name}.png"
        path.write_bytes(to_small_png(make()))
        yield path
