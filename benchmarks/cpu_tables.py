"""The results of a CPU as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .cases import FLAGS
from .costs import Cost
from .measure import Result

__all__ = ["costs_table", "speeds_table"]


def speeds_table(results: Sequence[Result], copy: float) -> Table:
    """A line per row, a section per rule and dtype; a rival's ratio to ours beside its time."""
    table = Table(title=f"microseconds per step, medians (a copy moves {copy:.1f} GB/s)")
    table.add_column("work")
    for name in ("stepwell", *(f"torch {name}" for name in FLAGS), "GB/s"):
        table.add_column(name, justify="right")
    table.add_column("must reach")
    section = None
    for result in results:
        name = f"{result.case.rule}, {str(result.case.dtype).removeprefix('torch.')}"
        if name != section:
            table.add_section()
            table.add_row(f"[bold]{name}[/bold]")
            section = name
        table.add_row(*_row(result))
    return table


def _row(result: Result) -> list[str]:
    case, missed = result.case, result.misses()
    bound = case.is_limited_by_memory and result.medians
    bars = ", ".join(map(str, result.checks()))
    return [
        case.work,
        f"{result.medians['stepwell']:,.1f}" if result.medians else "wrong",
        *(_rival(result, name) for name in FLAGS),
        f"{result.gigabytes_per_second['stepwell']:.1f}" if bound else "",
        f"[red]{'; '.join(missed)}[/red]" if missed else f"[green]{bars}[/green]",
    ]


def _rival(result: Result, name: str) -> str:
    if name in result.wrong:
        return "wrong"
    time = result.medians.get(name)
    return "" if time is None else f"{time:,.1f} {result.ratio(name):6.2f}x"


def costs_table(costs: Sequence[tuple[Cost, float]]) -> Table:
    """A line per price that is paid once."""
    table = Table(title="paid once")
    for name in ("what", "measured", "at most"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for cost, value in costs:
        colour = "green" if value <= cost.limit else "red"
        table.add_row(
            cost.what,
            f"[{colour}]{value:.3f} {cost.unit}[/{colour}]",
            f"{cost.limit:g} {cost.unit}",
        )
    return table
