"""The numbers of a race as a table, and in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isnan

from rich import box
from rich.table import Table
from rich.text import Text

from .contenders import OURS, RIVAL
from .runner import Duel, Result
from .task import Task

COLUMNS = (
    "test\naccuracy",
    "test\nloss",
    "train\nloss",
    "µs per\nstep",
    "times\nas fast",
    "bytes of\nstate",
)


def table(task: Task, duels: Iterable[Duel]) -> Table:
    """One row per contender, one section per rule; 80 columns hold it."""
    rows, test_rows = len(task.train[0]), len(task.test[0])
    shown = Table(
        title=f"{task.name}, {rows:,} rows to train on and {test_rows:,} to test",
        title_justify="left",
        title_style="bold",
        caption="µs per step: median of optimizer.step() after the first two steps,\n"
        "both libraries with their defaults",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("optimizer", "library"):
        shown.add_column(name, no_wrap=True, vertical="bottom")
    for name in COLUMNS:
        shown.add_column(name, justify="right", no_wrap=True)
    for duel in duels:
        shown.add_row(duel.rule.title, *row(duel.rival, times_as_fast=1.0))
        ours = row(duel.ours, times_as_fast=duel.speedup)
        shown.add_row("", *ours, style="bold", end_section=True)
    return shown


def row(result: Result, times_as_fast: float) -> list[str]:
    """The cells of one contender, from its library on."""
    return [
        result.contender.library,
        "-" if isnan(result.test_accuracy) else f"{result.test_accuracy:.2%}",
        f"{result.test_loss:.4f}",
        f"{result.losses[-1]:.4f}",
        f"{result.step_seconds * 1e6:,.1f}",
        f"{times_as_fast:.1f}×",
        f"{result.state_bytes:,}",
    ]


def verdict(duels: Sequence[Duel]) -> list[Text]:
    """Say what the numbers mean, one line each; the resumed runs come last."""
    apart = [
        Text(f"{duel.rule.title}: the trained parameters are at most {duel.distance:.2g} apart.")
        for duel in duels
    ]
    return [_agreement(duels), *apart, *map(_first_step, duels), *_resumed(duels)]


def failures(duels: Iterable[Duel]) -> list[Result]:
    """The contenders whose resumed run is not the uninterrupted one."""
    return [result for duel in duels for result in duel.results if result.unequal_after_resume]


def _first_step(duel: Duel) -> Text:
    rival, ours = (result.first_seconds * 1e3 for result in duel.results)
    said = (
        f"{duel.rule.title}: the first two steps took {rival:,.1f} ms with {RIVAL} and "
        f"{ours:,.1f} ms with {OURS}, which compiles in them."
    )
    if duel.further_steps:
        said += (
            " The training has too few steps to measure the others: "
            f"{duel.further_steps} further ones were taken for it."
        )
    return Text(said)


def _agreement(duels: Sequence[Duel]) -> Text:
    apart = max(abs(duel.rival.test_accuracy - duel.ours.test_accuracy) for duel in duels)
    if isnan(apart):
        apart = max(abs(duel.rival.test_loss - duel.ours.test_loss) for duel in duels)
        return Text(
            f"Both libraries run the same arithmetic: test losses are at most {apart:.2g} apart."
        )
    if apart == 0:
        return Text("Both libraries run the same arithmetic, so they reach the same accuracy.")
    return Text(
        "Both libraries run the same arithmetic but do not round alike: "
        f"accuracies are up to {apart * 100:.2f} points apart."
    )


def _resumed(duels: Sequence[Duel]) -> list[Text]:
    failed = failures(duels)
    if not failed:
        runs = sum(len(duel.results) for duel in duels)
        words = f"Resumed from half way, all {runs} runs end in the same bits as without a stop."
        return [Text(words, style="green")]
    return [
        Text(
            f"{result.contender.title}: resumed from half way, {name} differs from the run "
            f"without a stop by up to {distance:.2g}.",
            style="bold red",
        )
        for result in failed
        for name, distance in result.unequal_after_resume.items()
    ]
