"""The report of a GPU as tables, and its rows as lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

__all__ = ["line", "tables"]

Row = Mapping[str, Any]

TITLES = {
    "speeds": "microseconds per step: medians, and quartiles of ours",
    "counts": "per step, counted by torch's profiler",
    "first_steps": "AdamW's first step in a process of its own",
    "tuning": "microseconds per step, the fastest first",
}
RIVALS = ("fused", "foreach")


def line(row: Row) -> str:
    """One row in one line, for those who watch."""
    if row["error"]:
        return f"{row['what']}: {escape(row['error'])}"
    if "rule" in row:
        names = ("back-end", "stepwell", "quartiles", "torch fused", "torch foreach", "must reach")
        pairs = [(n, cell) for n, cell in zip(COLUMNS, _speed(row), strict=True) if n in names]
        cells = [f"{name} {cell}" for name, cell in pairs if cell]
        cells += [f"{name} is wrong: {escape(why)}" for name, why in row["wrong"].items()]
    else:
        shown = {k: v for k, v in row.items() if k not in ("what", "flags", "checks", "error")}
        cells = [f"{name} {_plain(value)}" for name, value in shown.items() if value != []]
    return f"{row['what']}: {', '.join(cells)}".replace("\n", ", ")


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """A table per section that has rows."""
    for section, title in TITLES.items():
        rows = report[section]
        if rows:
            yield _speeds(title, rows, report["copy"]) if section == "speeds" else _any(title, rows)


COLUMNS = (
    "work",
    "time of",
    "back-end",
    "stepwell",
    "quartiles",
    *(f"torch {name}" for name in RIVALS),
    *(f"vs {name}" for name in RIVALS),
    "GB/s",
    "of a copy",
    "must reach",
)


def _speeds(title: str, rows: Sequence[Row], copy: Row | None) -> Table:
    table = _table(title, COLUMNS, left=("work", "time of", "back-end", "must reach"))
    if copy is not None:
        work = f"copy, {copy['bytes'] / 1e9:.3g} GB read and written"
        cells = [
            work,
            "device",
            "",
            *_times(copy["microseconds"]),
            *[""] * 4,
            f"{copy['GB/s']:,.0f}",
        ]
        table.add_row(*cells, "100.0 %", "")
    section = None
    for row in rows:
        name = f"{row['rule']}, {row['dtype']}" if "rule" in row else row["what"]
        if name != section:
            table.add_section()
            table.add_row(f"[bold]{name}[/bold]")
            section = name
        table.add_row(*_speed(row))
    return table


def _speed(row: Row) -> list[str]:
    if row["error"]:
        return [*[""] * (len(COLUMNS) - 1), escape(row["error"])]
    times, ratios = row["microseconds"], row["ratios"]
    share = row.get("share_of_copy", {}).get("stepwell")
    rate = row.get("GB/s", {}).get("stepwell")
    return [
        row["work"],
        row["clock"],
        row["back-end"],
        *(_times(times["stepwell"]) if times else ("wrong", "")),
        *("wrong" if n in row["wrong"] else _number(times.get(n)) for n in RIVALS),
        *(f"{ratios[n]:.2f}x" if n in ratios else "" for n in RIVALS),
        "" if rate is None else f"{rate:,.0f}",
        "" if share is None else f"{100 * share:.1f} %",
        "\n".join(map(_outcome, row["checks"])) or escape("; ".join(row["missed"])),
    ]


def _times(summary: Row) -> tuple[str, str]:
    low, high = summary["quartiles"]
    return _number(summary["median"]), f"{_number(low)} to {_number(high)}"


def _number(time: Any) -> str:
    value = time["median"] if isinstance(time, Mapping) else time
    return "" if value is None else f"{value:,.{0 if value >= 1000 else 1}f}"


def _outcome(check: Row) -> str:
    if not check["missed_by"]:
        return f"[green]{check['bar']}: met[/green]"
    return f"[red]{check['bar']}: missed by {check['missed_by']:.1%}[/red]"


def _any(title: str, rows: Sequence[Row]) -> Table:
    """Rows of numbers, a column per key."""
    hidden = {"error", "missed", "flags", "checks"}
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in hidden))
    table = _table(title, [*keys, "must reach"], left=("what", "back-end", "cache", "must reach"))
    for row in rows:
        outcome = "\n".join(map(_outcome, row.get("checks", ())))
        table.add_row(
            *(_plain(row.get(key, "")) for key in keys), escape(row["error"] or "") or outcome
        )
    return table


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{number:g} {escape(name)}" for name, number in value.items())
    return f"{value:,.3f}".removesuffix(".000") if isinstance(value, float) else str(value)


def _table(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table
