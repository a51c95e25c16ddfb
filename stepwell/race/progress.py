"""What is seen of a race while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .contenders import Contender
from .runner import Plan, Report


@contextmanager
def progress(console: Console, contenders: list[Contender], plan: Plan) -> Iterator[Report]:
    """A bar for each contender; where the output is no terminal, a line now and then."""
    if not console.is_terminal:
        yield _lines(console, plan)
        return
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=14),
        TextColumn("{task.fields[doing]}"),
        console=console,
        # a thread that redraws would disturb the times that are measured
        auto_refresh=False,
    )
    tasks = {
        one.title: bars.add_task(one.title, total=plan.total, doing="waiting") for one in contenders
    }

    def report(contender: Contender, done: int, loss: float) -> None:
        doing = _doing(plan, done, loss)
        bars.update(tasks[contender.title], completed=done, doing=doing, refresh=True)

    with bars:
        yield report


def _lines(console: Console, plan: Plan) -> Report:
    def report(contender: Contender, done: int, loss: float) -> None:
        if done in (plan.half, plan.epochs, plan.total):
            console.print(f"{contender.title}: {_doing(plan, done, loss)}")

    return report


def _doing(plan: Plan, done: int, loss: float) -> str:
    if done == plan.total:
        return "done"
    if done <= plan.epochs:
        return f"epoch {done}/{plan.epochs}, loss {loss:.4f}"
    again = plan.half + done - plan.epochs
    return f"resume test, epoch {again}/{plan.epochs}, loss {loss:.4f}"
